"""The institution's half of secure aggregation."""
