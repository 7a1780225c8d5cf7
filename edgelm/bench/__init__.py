"""Speed of a bundle on this machine: benchmark, profiler, and the choice of thread settings."""
