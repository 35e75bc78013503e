"""The machine without data: what Flower calls, and the channel from there to the trainer."""
