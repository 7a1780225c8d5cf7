"""Emits the kernels as LLVM IR, from one description for all processors."""
