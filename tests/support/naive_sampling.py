"""Plain-loop twins of the sampling kernels, in float64, as an independent oracle.

They also return a margin: it is small if float64 and fixed-point weights could decide differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgelm.types import SamplingParams


def mask_logits(logits: Sequence[float], mask: Sequence[int]) -> list[float]:
    """Return the logits with those of forbidden tokens set to -inf."""
    masked = []
    for token, logit in enumerate(logits):
        allowed = int(mask[token // 32]) & 2 ** (token % 32)
        masked.append(float(logit) if allowed else -math.inf)
    return masked


def penalize(logits: Sequence[float], history: Sequence[int], penalty: float) -> list[float]:
    """Return the logits after the repetition penalty, computed in float32."""
    penalized = [float(logit) for logit in logits]
    for token in set(history):
        if 0 <= token < len(penalized):
            value, factor = np.float32(penalized[token]), np.float32(penalty)
            penalized[token] = float(value * factor if value < 0 else value / factor)
    return penalized


@dataclass
class Kept:
    """The tokens that the filters keep, with their probabilities, and the smallest distance of any decision."""

    probabilities: dict[int, float]
    margin: float

    def draw(self, uniform: float) -> int:
        """Return the token by inverse transform sampling over the kept tokens in order of their ids."""
        total = math.fsum(self.probabilities.values())
        position = 0.0
        for token in sorted(self.probabilities):
            position += self.probabilities[token] / total
            self.margin = min(self.margin, abs(position - uniform) if position < 1 - 1e-9 else 1.0)
            if position > uniform:
                return token
        return max(self.probabilities)


def keep(logits: Sequence[float], params: SamplingParams) -> Kept:
    """Return the tokens that temperature, top-k, top-p and min-p keep, in this order, with their probabilities."""
    ranked = sorted((token for token, logit in enumerate(logits) if logit > -math.inf), key=lambda t: (-logits[t], t))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    best = logits[ranked[0]]
    shares = {token: math.exp((logits[token] - best) / params.temperature) for token in ranked}
    total = math.fsum(shares.values())
    margin = 1.0
    kept: list[int] = []
    above = 0.0
    for token in ranked:
        if params.top_p < 1.0 and kept:
            margin = min(margin, abs(above / total - params.top_p))
            if above / total >= params.top_p:
                break
        kept.append(token)
        above += shares[token]
    if params.min_p > 0.0:
        for token in kept[1:]:
            margin = min(margin, abs(shares[token] - params.min_p))
        kept = kept[:1] + [token for token in kept[1:] if shares[token] >= params.min_p]
    mass = math.fsum(shares[token] for token in kept)
    return Kept({token: shares[token] / mass for token in kept}, margin)


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Return the natural-log probabilities."""
    best = max(logits)
    norm = best + math.log(math.fsum(math.exp(logit - best) for logit in logits))
    return [logit - norm for logit in logits]
