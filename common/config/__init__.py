"""How a value from outside becomes a frozen one: TOML, strict tables, a run's configuration."""
