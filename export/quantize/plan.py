"""Which bits, block size, method and accuracy level each matrix of a model gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from .pack import Method

Quant = Literal["fp32", "int8", "int4"]
BITS: Final[dict[Quant, int]] = {"fp32": 32, "int8": 8, "int4": 4}
BLOCK_SIZES: Final = (32, 64, 128)

WIDE: Final = 512
"""From this width on, 64 weights share a scale by default: 4.5 bits a weight instead of 5, and faster kernels. In
narrower models a row has too few scales for that: at width 64, +15 % perplexity instead of +11 %."""

ACCURACY_LEVEL: Final = 4
"""MatMulNBits: activations rounded to int8 a block, the fast path of the CPU kernels."""


def default_block_size(width: int) -> int:
    """Return the weights a scale for a model whose hidden states have `width` elements."""
    return 64 if width >= WIDE else 32


@dataclass(frozen=True, slots=True)
class Plan:
    """One precision for every matrix."""

    quant: Quant
    block_size: int
    method: Method

    @property
    def bits(self) -> int:
        """Bits a weight, scales not counted."""
        return BITS[self.quant]
