"""The frozen base, the adapter on top of it, and its state as one vector."""
