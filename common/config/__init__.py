"""How a value from outside becomes a frozen one.

TOML, strict tables, and the configuration of a run.
"""
