"""Choosing the next token: `Sampler` orders the steps, `kernels` computes them.

Importing this package loads numpy alone. Numba (65 MB, 0.4 s) comes with the first request that truly samples, or
with `load_kernels`; `ensure_compiled` sees to it that nothing is left to compile then.
"""

from edgelm.sampling.ready import ensure_compiled
from edgelm.sampling.sampler import Sampler, are_kernels_loaded, load_kernels, needs_kernels

__all__ = ["Sampler", "are_kernels_loaded", "ensure_compiled", "load_kernels", "needs_kernels"]
