"""Choosing the next token: `Sampler` orders the steps, Numba kernels compute them.

Importing this package loads only numpy. Numba (65 MB, 0.4 s) is loaded by the first request that needs a kernel, or by
`load_kernels`. `ensure_compiled` compiles the kernels beforehand.
"""

from edgelm.sampling.precompilation import ensure_compiled
from edgelm.sampling.sampler import Sampler, are_kernels_loaded, load_kernels, needs_kernels

__all__ = ["Sampler", "are_kernels_loaded", "ensure_compiled", "load_kernels", "needs_kernels"]
