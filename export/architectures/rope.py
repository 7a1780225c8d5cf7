"""Tables of rotary position embedding (Su et al. 2021, arXiv:2104.09864, section 3.2.2) and its context extensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
ROPE_KINDS: Final[tuple[Kind, ...]] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become angles.

    `linear` divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595). `dynamic` changes only positions past
    the checkpoint's own context, which a bundle never exceeds, so it equals `default`. `llama3` divides low frequencies
    and interpolates between, by wavelength relative to `original_context` (Llama 3.1's rule). `yarn` interpolates by
    the number of turns within `original_context` and scales the tables by `attention_factor` (Peng et al. 2023,
    arXiv:2309.00071, section 3). `longrope` divides each frequency by its own factor: from `short_factors` while a
    sequence fits `original_context`, from `long_factors` after that (Ding et al. 2024, arXiv:2402.13753, section 3).
    """

    theta: float
    kind: Kind = "default"
    factor: float = 1.0
    original_context: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def long_from(self, context: int) -> int | None:
        """Return the length above which a sequence needs the long factors; None if this context cannot exceed it."""
        return self.original_context if self.kind == "longrope" and context > self.original_context else None

    def tables(self, context: int, size: int) -> tuple[Array, Array]:
        """Return cosines and sines, float32 [context, size / 2] each. `size`: rotating elements of a head.

        [2 * context, size / 2] if `long_from` is not None: the tables of the short factors, then those of the long
        ones.
        """
        parts = [self._frequencies(size, self.short_factors)]
        if self.long_from(context) is not None:
            parts.append(self._frequencies(size, self.long_factors))
        positions = np.arange(context, dtype=np.float32)[:, None]
        angles: Array = np.concatenate([positions * frequencies for frequencies in parts])
        scale = np.float32(self.attention_factor)
        cosines: Array = np.cos(angles) * scale
        sines: Array = np.sin(angles) * scale
        return cosines, sines

    def _frequencies(self, size: int, factors: tuple[float, ...]) -> Array:
        """Return radians per position, float32 [size / 2], computed in float32 as in training."""
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        wavelengths: Array = np.power(np.float32(self.theta), exponents)
        if self.kind == "longrope":
            wavelengths = wavelengths * np.asarray(factors, np.float32)
        frequencies: Array = np.float32(1) / wavelengths
        if self.kind == "linear":
            frequencies = frequencies / np.float32(self.factor)
        elif self.kind == "llama3":
            turns = self.original_context / (2 * math.pi / frequencies)
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            frequencies = self._blend(frequencies, np.clip(kept, 0.0, 1.0))
        elif self.kind == "yarn":
            frequencies = self._blend(frequencies, 1 - self._ramp(size))
        return frequencies

    def _blend(self, frequencies: Array, kept: Array) -> Array:
        """Divide by `factor` where `kept` is 0 and not where it is 1; interpolate between."""
        blended: Array = ((1 - kept) * frequencies / self.factor + kept * frequencies).astype(np.float32)
        return blended

    def _ramp(self, size: int) -> Array:
        """Return 0 for dimensions with over `beta_fast` turns in the original context, 1 with under `beta_slow`."""
        first, last = (
            size * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        width = last - first if last != first else 0.001
        ramp: Array = np.clip((np.arange(size // 2, dtype=np.float32) - first) / np.float32(width), 0, 1)
        return ramp


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all: float | None) -> float:
    """Return YaRN's recommended scale of the tables (section 3.4); 0.1 ln(factor) + 1 by default."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    return scale(mscale) / scale(mscale_all) if mscale and mscale_all else scale(1.0)


def longrope_attention_factor(factor: float, original_context: int) -> float:
    """Return LongRoPE's scale of the tables for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_context))
