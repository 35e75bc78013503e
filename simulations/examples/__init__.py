"""Whole programs to begin from: each runs within a minute, and a test runs it."""
