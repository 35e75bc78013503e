"""The only owner of a budget: an append-only chain that never refunds."""
