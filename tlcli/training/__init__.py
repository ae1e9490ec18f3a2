"""Training the backbone's own units."""
