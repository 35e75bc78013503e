"""What a data protection officer gets, and how anybody checks it."""
