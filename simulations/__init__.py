"""Many institutions on one machine: partitions, the in-process engine, reports, benchmarks."""
