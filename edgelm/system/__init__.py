"""Access to the operating system: cache folder, file ownership, memory, sensors, terminal, child processes."""
