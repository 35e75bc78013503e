"""What survives a kill: files that are whole or not there, lines that are, locks that end."""
