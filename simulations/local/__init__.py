"""A whole deployment on this machine: its folders, its processes, a run of it."""
