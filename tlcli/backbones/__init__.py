"""Pretrained networks: loading them by name, their units, and dividing them at a cut."""
