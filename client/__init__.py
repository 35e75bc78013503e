"""What runs at an institution: the only code that touches private text."""
