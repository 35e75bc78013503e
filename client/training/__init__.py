"""The only code that computes on private text: draw, clip, noise, step."""
