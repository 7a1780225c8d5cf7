"""Choosing the next token: `Sampler` orders the steps, `kernels` computes them.

Importing this package loads numpy alone. Numba (65 MB, 0.4 s) comes with the first request that truly samples, or
with `warm_up`.
"""

from edgelm.sampling.sampler import Sampler, warm_up

__all__ = ["Sampler", "warm_up"]
