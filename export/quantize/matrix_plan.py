"""Which bits, block size, method and accuracy level each matrix of a model gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from .spec import QuantSpec

Quant = Literal["fp32", "int8", "int6", "int5", "int4", "mixed", "keep"]
BITS: Final[dict[Quant, int]] = {"fp32": 32, "int8": 8, "int6": 6, "int5": 5, "int4": 4, "mixed": 4, "keep": 8}
"""Bits a weight, scales not counted; of `mixed` those that a matrix has before any is upgraded, of `keep` those of one
that cannot be kept."""

QUANTIZED_BITS: Final = (4, 5, 6, 8)
"""Bits that a quantized matrix may have."""

TOKEN_MATRICES: Final = ("embedding", "head")
"""The matrices with a row for each token."""

EMBEDDING_BITS: Final[dict[Quant, int]] = {"int4": 5, "int5": 5, "int6": 6, "mixed": 4}
"""Bits of embedding and head unless a budget chooses them. Rounded to 4 bits they cost much for their share of the
weights; llama.cpp's Q4_0 has them in 8 where they are one matrix."""

PARTS_WITH_LARGE_BLOCKS: Final = ("gate_up",)
"""Parts that have blocks of 64 weights in an int5 bundle, as embedding and head of 5 bits have in all: they gain least
from smaller ones (SmolLM2-135M in int5 without calibration: KL .126 in 91.5 MB, .102 in 94 MB with 32 for all parts,
.139 in 90 MB with 64 for all)."""

BLOCK_SIZES: Final = (16, 32, 64, 128)
DEFAULT_BLOCK_SIZE: Final = 32
"""4.5 bits a weight, as llama.cpp's Q4_0; larger blocks are smaller and faster and lose more, unless calibrated."""

MIXED_BITS: Final = 5.5
"""Bits a weight of `mixed` where nothing else is asked for, those of llama.cpp's Q5_0."""


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """How matrices are stored; None is float32.

    `exceptions` are by a matrix's name (`layer.3.down`), which comes first, or by its part (`down`).
    """

    default: QuantSpec | None
    exceptions: Mapping[str, QuantSpec | None] = field(default_factory=dict)

    def spec(self, name: str) -> QuantSpec | None:
        """Return how a matrix is stored."""
        part = name.rpartition(".")[2]
        return self.exceptions.get(name, self.exceptions.get(part, self.default))

    @property
    def is_calibrated(self) -> bool:
        """Whether any matrix needs to know what reaches it."""
        specs = [self.default, *self.exceptions.values()]
        return any(spec is not None and spec.method == "gptq" for spec in specs)


def with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    """Return how a matrix is stored in other bits.

    8 bits are rounded to nearest: more costs time and brings nothing. 5 and 6 bits have no zero points, and blocks of
    at least 32, whose bits above the low four fill whole bytes.
    """
    if bits == 8:
        return replace(spec, bits=bits, method="rtn")
    if bits == 4:
        return replace(spec, bits=bits)
    return replace(spec, bits=bits, symmetric=True, block_size=max(spec.block_size, 32))
