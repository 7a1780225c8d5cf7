"""What text says of a matrix's inputs, and what each matrix costs when it is quantized."""
