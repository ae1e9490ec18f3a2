"""The command line: thin files that make options a configuration, call the library and print."""
