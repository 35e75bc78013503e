"""What a run leaves for a reader: pages, pictures, tables."""
