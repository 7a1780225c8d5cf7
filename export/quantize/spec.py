"""QuantSpec: how one matrix is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

KEEP: Final = "keep"
"""`QuantSpec.method` of a matrix whose codes are copied from the checkpoint. It is not a module in `methods`."""


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one matrix is stored, and the method that chooses its codes.

    bits: 4, 5, 6 or 8; 5 and 6 only with `symmetric`. 32 means float32 and is never passed to `Quantizer`.
    block_size: weights of a row that share one scale: 16, 32, 64 or 128. symmetric: the zero point is 2^(bits-1);
    otherwise one zero point is stored for each block. method: a name from `methods.method_names`, or `KEEP`.
    accuracy_level: the attribute of MatMulNBits (4: activations are rounded to int8).
    """

    bits: int
    block_size: int
    symmetric: bool = True
    method: str = "clip"
    accuracy_level: int = 4
