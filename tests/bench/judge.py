"""How far logits are from a reference's, on the same tokens: one judge for every runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgelm.runtime.divergence import DivergenceMeter, DivergenceReport

CHUNK: Final = 1 << 22
"""Logits judged at a time."""

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids of all documents behind each other, and how many each has."""

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def documents(self) -> Iterator[tuple[int, list[int]]]:
        """Yield where each document starts, and its ids."""
        start = 0
        for length in map(int, self.lengths):
            yield start, self.tokens[start : start + length].tolist()
            start += length

    def scored(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the positions that have a next token in their document, and those next tokens."""
        ends = np.cumsum(self.lengths) - 1
        positions = np.delete(np.arange(len(self.tokens)), ends)
        return positions, self.tokens[positions + 1]


def judge(reference: Logits, logits: Logits, corpus: Corpus) -> DivergenceReport:
    """Compare logits float32 [tokens, vocabulary] with the reference's at every position that predicts a token."""
    positions, following = corpus.scored()
    step = max(1, CHUNK // reference.shape[1])
    divergence = DivergenceMeter()
    for at in range(0, len(positions), step):
        rows = positions[at : at + step]
        divergence.add(reference[rows], logits[rows], following[at : at + step])
    return divergence.result()
