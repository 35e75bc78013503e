"""What an outside review tried around the mechanism, each red before it was mended."""
