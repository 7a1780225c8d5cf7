"""Our own matrix and attention kernels: compiled for this board by Numba's LLVM, run by onnxruntime as operators."""
