"""A run followed on a page of this machine's browser, and small services on loopback alone."""
