"""The plan of a model: the bits, block size, method and accuracy level of each matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from .methods import load_method, needs_calibration
from .spec import QuantSpec

Quant = Literal["fp32", "int8", "int6", "int5", "int4", "mixed", "keep"]
BITS: Final[dict[Quant, int]] = {"fp32": 32, "int8": 8, "int6": 6, "int5": 5, "int4": 4, "mixed": 4, "keep": 8}
"""Bits per weight, scales not counted. `mixed`: the bits before any upgrade. `keep`: the bits of a matrix that cannot
be kept."""

QUANTIZED_BITS: Final = (4, 5, 6, 8)
"""Bits per weight that a quantized matrix may have."""

TOKEN_MATRICES: Final = ("embedding", "head")
"""The matrices with one row for each token."""

EMBEDDING_BITS: Final[dict[Quant, int]] = {"int4": 5, "int5": 5, "int6": 6, "mixed": 4}
"""Default bits of embedding and head; a budget may choose others. With 4 bits they lose much quality for the few bytes
saved; llama.cpp's Q4_0 stores a tied embedding with 8."""

PARTS_WITH_LARGE_BLOCKS: Final = ("gate_up",)
"""Parts with blocks of 64 weights in an int5 bundle; 5-bit embeddings and heads always have such blocks. These parts
gain least from smaller blocks (SmolLM2-135M, int5 without calibration: KL .126 in 91.5 MB; .102 in 94 MB with 32 for
all parts; .139 in 90 MB with 64 for all)."""

BLOCK_SIZES: Final = (16, 32, 64, 128)
DEFAULT_BLOCK_SIZE: Final = 32
"""4.5 bits per weight at 4 bits, like llama.cpp's Q4_0. Larger blocks take fewer bytes and run faster, but lose more
quality without calibration."""

MIXED_BITS: Final = 5.5
"""Default bits per weight of `mixed`, scales counted: those of llama.cpp's Q5_0."""


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """How each matrix is stored; None means float32.

    Keys of `exceptions` are a matrix's name (`layer.3.down`) or its part (`down`); the name takes precedence.
    """

    default: QuantSpec | None
    exceptions: Mapping[str, QuantSpec | None] = field(default_factory=dict)

    def spec(self, name: str) -> QuantSpec | None:
        """Return how a matrix is stored."""
        part = name.rpartition(".")[2]
        return self.exceptions.get(name, self.exceptions.get(part, self.default))

    @property
    def is_calibrated(self) -> bool:
        """Whether the method of any matrix needs calibration text."""
        specs = [self.default, *self.exceptions.values()]
        return any(spec is not None and needs_calibration(spec.method) for spec in specs)


def with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    """Return the spec with other bits.

    8 bits use rtn: other methods take longer and gain nothing. 5 and 6 bits are symmetric and have blocks of at least
    32, so that the bits above the low four fill whole bytes.
    """
    if bits == 8:
        return replace(spec, bits=bits, method="rtn")
    if bits == 4:
        return replace(spec, bits=bits)
    return replace(spec, bits=bits, symmetric=True, block_size=max(spec.block_size, 32))


def without_calibration(spec: QuantSpec) -> QuantSpec:
    """Return the spec with the method's fallback, if the method needs calibration text."""
    fallback = load_method(spec.method).fallback
    return spec if fallback is None else replace(spec, method=fallback)
