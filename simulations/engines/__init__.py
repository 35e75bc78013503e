"""Ways to ask many institutions on one machine: one after the other, under masks, on Ray."""
