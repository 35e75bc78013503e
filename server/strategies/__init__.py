"""Aggregation strategies: how the updates of a round become the next adapter."""
