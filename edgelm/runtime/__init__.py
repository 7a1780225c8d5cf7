"""A graph in onnxruntime with its key/value memory and weights. The only package that imports onnxruntime."""
