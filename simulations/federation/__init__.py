"""Who has which data: population, partition, and the folder of a simulated run."""
