"""Settings, set-up, optimizer, data, validation and monitoring of a training run."""
