"""The repetition penalty: a logit step. Compiled by Numba."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgelm.sampling.kernel_compiler import jit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelm.sampling.sampler import LogitStep
    from edgelm.types import SamplingParams


@jit("void(float32[::1], int32[::1], uint32[::1], float32)")
def penalize(
    logits: NDArray[np.float32], history: NDArray[np.int32], seen: NDArray[np.uint32], penalty: np.float32
) -> None:
    """Make the tokens of the history less likely (CTRL, Keskar et al. 2019, section 4.1), each token once.

    A positive logit is divided by the penalty. A negative one is multiplied, as in transformers, which deviates from
    the paper: division would make the token likelier.

    Parameters
    ----------
    logits
        float32 [V], changed in place.
    history
        int32 [n]; ids outside [0, V) are ignored.
    seen
        uint32 [ceil(V / 32)], scratch: all zero before and after.
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


def make_step(params: SamplingParams, vocab_size: int) -> LogitStep:
    """Return the step of one request; it owns its scratch memory."""
    seen = np.zeros(-(-vocab_size // 32), np.uint32)
    penalty = np.float32(params.repetition_penalty)

    def step(logits: NDArray[np.float32], history: NDArray[np.int32]) -> None:
        penalize(logits, history, seen, penalty)

    return step
