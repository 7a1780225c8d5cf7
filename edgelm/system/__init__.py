"""What the operating system tells and keeps: files, processes, memory, sensors, the terminal."""
