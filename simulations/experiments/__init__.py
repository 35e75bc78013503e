"""What a researcher starts: a plan, a run, a sweep, the quickstart."""
