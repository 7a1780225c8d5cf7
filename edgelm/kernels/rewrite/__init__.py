"""A bundle's graph rewritten for the kernels: which nodes are fused, and how its weights are laid out."""
