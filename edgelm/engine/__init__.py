"""The engine: decodes many requests together, one step at a time, on the thread of a worker."""
