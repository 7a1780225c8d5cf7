"""Matrix kernels of our own, compiled for this board by the LLVM that Numba brings, and run by onnxruntime."""
