"""Quantization: methods that choose codes, the packed layout of onnxruntime's kernels, and the plan of a model."""
