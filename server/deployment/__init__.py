"""The round loop over real machines: processes, members that answer for themselves, Flower."""
