"""The coordinator's half of secure aggregation: it adds, unmasks, and learns sums only."""
