"""How far logits are from a reference's, on the same tokens: one judge for every runtime."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity of the text; KL divergence of the reference from the judged in nats: mean and 99th percentile; and the
    share of positions where both put the same token first.
    """

    perplexity: float
    kl: float
    kl_p99: float
    agreement: float


def judge(reference: Logits, logits: Logits, corpus: Corpus) -> Quality:
    """Compare logits float32 [tokens, vocabulary] with the reference's at every position that predicts a token."""
    positions, targets = corpus.scored()
    step = max(1, CHUNK // reference.shape[1])
    kl, nats, agreed = [], 0.0, 0
    for at in range(0, len(positions), step):
        rows = positions[at : at + step]
        ours, theirs = log_softmax(logits[rows]), log_softmax(reference[rows])
        kl.append((np.exp(theirs) * (theirs - ours)).sum(axis=1))
        nats -= float(ours[np.arange(len(rows)), targets[at : at + step]].sum())
        agreed += int((ours.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    each = np.concatenate(kl)
    perplexity = math.exp(nats / len(positions))
    return Quality(perplexity, float(each.mean()), float(np.quantile(each, 0.99)), agreed / len(positions))


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Return natural-log probabilities [n, vocabulary]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
