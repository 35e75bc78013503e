"""Rows, units, labels and tokens: what a data file becomes before anything is trained on it."""
