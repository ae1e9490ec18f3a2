"""Every option: its default, range, help and check, written once."""
