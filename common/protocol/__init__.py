"""What crosses between machines, as values and as bytes."""
