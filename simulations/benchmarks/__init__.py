"""Benchmarks, by hand or by `make bench`; each prints a table and writes figures with --json."""
