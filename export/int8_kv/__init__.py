"""The int8 KV cache: its scales, and the graph that uses them."""
