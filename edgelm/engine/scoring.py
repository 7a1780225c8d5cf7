"""Scores a text: the log-probability of each token given the tokens before it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgelm.runtime.runner import Runner

SCORE_CHUNK: Final = 64
"""Positions scored in one pass; limits the memory of the logits."""


def score(runner: Runner, row: int, tokens: list[int]) -> NDArray[np.float64]:
    """Return the natural-log probability of each token after the first, float64 [n - 1]. Overwrites a row."""
    result = np.empty(max(len(tokens) - 1, 0), np.float64)
    inputs = np.asarray(tokens, np.int64)
    for start in range(0, len(result), SCORE_CHUNK):
        end = min(start + SCORE_CHUNK, len(result))
        part = runner.prefill(row, inputs[start:end], start, all_logits=True, final_length=len(tokens))
        logits = part.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(end - start), inputs[start + 1 : end + 1]]
        result[start:end] = chosen - np.log(np.exp(logits).sum(axis=1))
    return result
