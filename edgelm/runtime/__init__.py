"""Runs a graph in onnxruntime with its KV cache and packed weights. The only package that imports onnxruntime."""
