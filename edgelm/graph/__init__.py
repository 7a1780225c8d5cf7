"""Reads, checks and changes ONNX graphs in their encoded form, without the onnx package."""
