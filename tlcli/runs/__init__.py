"""The run directory: written, read back, described."""
