"""Request bytes in, signed bytes out: the resident trainer, and the endpoint that it listens at."""
