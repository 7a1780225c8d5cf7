"""Decoding many requests together: admission, scheduling, one step at a time, and the thread that owns it."""
