"""Keys and values in int8: their scales, and the graph that uses them."""
