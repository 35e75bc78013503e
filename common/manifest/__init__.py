"""Everything public about a run, and one attempt at one of its rounds."""
