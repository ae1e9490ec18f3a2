"""The machine below: files, devices, memory, processes, signals, environment variables."""
