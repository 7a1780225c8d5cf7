"""ONNX graphs without the onnx package: read, checked and changed in their bytes."""
