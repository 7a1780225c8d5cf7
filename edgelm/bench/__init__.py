"""Speed of a bundle on this machine: benchmark, profiler, threads."""
