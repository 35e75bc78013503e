"""What a researcher starts: a check, a plan, a run, a sweep, a comparison, the quickstart."""
