"""ONNX graphs: their nodes, constants and matrices, the decoder written as one, and others read."""
