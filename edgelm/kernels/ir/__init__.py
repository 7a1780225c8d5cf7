"""The kernels as LLVM IR, written by Python from one description for all processors."""
