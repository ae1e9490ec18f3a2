"""One module a command: its plan and its work, without the command line."""
