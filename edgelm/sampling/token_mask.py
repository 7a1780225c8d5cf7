"""The constraint's token mask, applied to logits. Compiled by Numba. Knows nothing of grammars."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelm.sampling.kernel_compiler import jit

if TYPE_CHECKING:
    from numpy.typing import NDArray


@jit("void(float32[::1], uint32[::1])")
def mask_logits(logits: NDArray[np.float32], mask: NDArray[np.uint32]) -> None:
    """Set the logits of forbidden tokens to -inf.

    Parameters
    ----------
    logits
        float32 [V], changed in place.
    mask
        uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 is 1 if token i is allowed.
    """
    for word in range(mask.size):
        bits = np.int64(mask[word])
        if bits == 0xFFFFFFFF:
            continue
        block = logits[word * 32 : word * 32 + 32]
        for i in range(block.size):
            if (bits >> i) & 1 == 0:
                block[i] = -np.inf
