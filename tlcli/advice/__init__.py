"""Which scenario fits a data set, and why."""
