"""Benchmarks, run by hand or by `make bench`; each prints a table and writes its figures with
--json.
"""
