"""What leaves the federation, and how anybody checks it offline."""
