"""What a coordinator runs: the round loop, aggregation strategies and checkpoints."""
