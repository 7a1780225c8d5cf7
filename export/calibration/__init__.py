"""Statistics of each matrix's inputs on text, and the cost of quantizing each matrix."""
