"""What changes logits before a draw: the grammar's mask and the repetition penalty. Compiled by Numba."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelm.sampling.compiled import jit

if TYPE_CHECKING:
    from numpy.typing import NDArray


@jit("void(float32[::1], uint32[::1])")
def mask_logits(logits: NDArray[np.float32], mask: NDArray[np.uint32]) -> None:
    """Set the logits of tokens that the mask forbids to -inf.

    Parameters
    ----------
    logits
        float32 [V], changed in place.
    mask
        uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 belongs to token i.
    """
    for word in range(mask.size):
        bits = np.int64(mask[word])
        if bits == 0xFFFFFFFF:
            continue
        block = logits[word * 32 : word * 32 + 32]
        for i in range(block.size):
            if (bits >> i) & 1 == 0:
                block[i] = -np.inf


@jit("void(float32[::1], int32[::1], uint32[::1], float32)")
def penalize(
    logits: NDArray[np.float32], history: NDArray[np.int32], seen: NDArray[np.uint32], penalty: np.float32
) -> None:
    """Make the tokens of the history less likely (CTRL, Keskar et al. 2019, section 4.1), each once.

    A positive logit is divided by the penalty. A negative one is multiplied, which is transformers' deviation from
    the paper and ours: division would make it likelier.

    Parameters
    ----------
    logits
        float32 [V], changed in place.
    history
        int32 [n]; ids outside [0, V) are ignored.
    seen
        uint32 [ceil(V / 32)], all zero before and after.
    penalty
        Above 0; 1 changes nothing.
    """
    for j in range(history.size):
        token = np.int64(history[j])
        if token < 0 or token >= logits.size:
            continue
        word = np.int64(seen[token >> 5])
        bit = np.int64(1) << (token & 31)
        if word & bit:
            continue
        seen[token >> 5] = np.uint32(word | bit)
        value = logits[token]
        logits[token] = value * penalty if value < 0 else value / penalty
    for j in range(history.size):
        token = np.int64(history[j])
        if 0 <= token < logits.size:
            seen[token >> 5] = np.uint32(0)
