"""Rewrites a bundle's graph for the kernels: fuses nodes, and packs the weights into panels."""
