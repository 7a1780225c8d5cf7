"""Which bits, block size, method and accuracy level each matrix of a model gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from .spec import Spec

Quant = Literal["fp32", "int8", "int4"]
BITS: Final[dict[Quant, int]] = {"fp32": 32, "int8": 8, "int4": 4}
BLOCK_SIZES: Final = (16, 32, 64, 128)

WIDE: Final = 512
"""From this width on, 64 weights share a scale by default: 4.5 bits a weight instead of 5, and faster kernels. In
narrower models a row has too few scales for that: at width 64, +15 % perplexity instead of +11 %."""


def default_block_size(width: int) -> int:
    """Return the weights a scale for a model whose hidden states have `width` elements."""
    return 64 if width >= WIDE else 32


@dataclass(frozen=True, slots=True)
class Plan:
    """How matrices are stored, by name: those in `exceptions` as said there, all others alike. None is float32."""

    default: Spec | None
    exceptions: Mapping[str, Spec | None] = field(default_factory=dict)

    def spec(self, name: str) -> Spec | None:
        """Return how a matrix is stored."""
        return self.exceptions.get(name, self.default)
