"""Weights in few bits: rounding methods, the packed layout of onnxruntime's kernels, and the plan for a model."""
