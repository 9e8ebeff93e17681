"""What every command stands on: flags, console, processes and devices, transfers, the hub."""
