"""A released adapter behind a local HTTP endpoint, for trying it."""
