"""The coordinator's folder: its keys and certificates, and who is a member."""
