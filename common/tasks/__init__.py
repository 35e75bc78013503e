"""What a model is trained for: one file for each task, and what all of them have in common."""
