"""What a schedule costs, which noise it needs, where that comes from, and what may be said."""
