"""ONNX graphs: nodes, constants and matrices, the decoder as a graph, and reading other graphs."""
