"""A released adapter as files, and back."""
