"""Divergence of one model's predictions from another's, position by position, without storing the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgelmError

MAX_NATS = 700.0
"""Maximum of the mean nats per token in a perplexity: exp of more overflows a float."""


@dataclass(frozen=True, slots=True)
class DivergenceReport:
    """A model compared with its reference on the same text.

    Perplexities are per token. KL is the Kullback-Leibler divergence of the model's next-token distribution from the
    reference's, in nats: its mean and 99th percentile over positions. `top1_agreement` is the share of positions, in
    [0, 1], where both models predict the same token.
    """

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float


class DivergenceMeter:
    """Collects the divergences of positions. Not thread-safe."""

    def __init__(self) -> None:
        self._kl: list[NDArray[np.float64]] = []
        self._nats = [0.0, 0.0]
        self._same = 0

    def add(self, reference: NDArray[np.float32], logits: NDArray[np.float32], following: NDArray[np.int64]) -> None:
        """Add positions: logits of both models, float32 [n, V], and the tokens that followed, int64 [n].

        Raises `EdgelmError` if logits are not finite.
        """
        if not (np.isfinite(reference).all() and np.isfinite(logits).all()):
            raise EdgelmError("the model's logits are not finite: its quality cannot be measured")
        expected, found = _log_softmax(reference), _log_softmax(logits)
        self._kl.append(_kl_divergences(expected, found))
        at = np.arange(len(following))
        for i, logprobs in enumerate((expected, found)):
            self._nats[i] -= float(logprobs[at, following].sum())
        self._same += int((reference.argmax(axis=1) == logits.argmax(axis=1)).sum())

    def result(self) -> DivergenceReport:
        """Return the report over all positions. Raises `EdgelmError` if there are none."""
        kl = np.concatenate(self._kl) if self._kl else np.zeros(0)
        if not len(kl):
            raise EdgelmError("the text is too short: it has no token to predict")
        reference, own = (math.exp(min(nats / len(kl), MAX_NATS)) for nats in self._nats)
        return DivergenceReport(
            tokens=len(kl),
            perplexity=own,
            reference_perplexity=reference,
            kl_mean=max(0.0, float(kl.mean())),
            kl_p99=max(0.0, float(np.quantile(kl, 0.99))),
            top1_agreement=self._same / len(kl),
        )


def kl_divergences(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the Kullback-Leibler divergence of each position in nats, float64 [n]; logits are float32 [n, V].

    NaN for positions with logits that are not finite.
    """
    return _kl_divergences(_log_softmax(reference), _log_softmax(logits))


def _kl_divergences(expected: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = (np.exp(expected) * (expected - found)).sum(axis=1)
    return total


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
