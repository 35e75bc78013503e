"""What a configuration leaves open, chosen from public facts: a rule a phase, with its reason."""
