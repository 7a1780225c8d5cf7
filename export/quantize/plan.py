"""Which bits, block size, method and accuracy level each matrix of a model gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from .pack import Method

Quant = Literal["fp32", "int8", "int4"]
BITS: Final[dict[Quant, int]] = {"fp32": 32, "int8": 8, "int4": 4}
BLOCK_SIZES: Final = (32, 64, 128)

ACCURACY_LEVEL: Final = 4
"""MatMulNBits: activations rounded to int8 a block, the fast path of the CPU kernels."""


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
