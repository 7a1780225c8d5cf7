"""What a quantization method is: how it chooses the codes of a matrix, and what it needs for that.

Each method is one module in `methods`. This module does not know which ones exist, or how codes are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .grids import round_blocks
from .moments import Moments
from .spec import QuantSpec

Array = NDArray[np.float32]

ROW_TILE: Final = 16
"""`QuantizeRows` gets a multiple of this many rows, except for the last rows of a matrix."""

ChooseGrids = Callable[[Array, Array, int, int, bool, bool, Array, Array], None]
"""Compiled kernel (rows, importance, block_size, bits, symmetric, is_float16, scales, zeros): writes the scale and zero
point of every block. Shapes and dtypes are those of `QuantizeRows`; rows and importance are not changed."""


class QuantizeRows(Protocol):
    """Chooses the scales, zero points and codes of some rows of a matrix. Called by several threads at a time."""

    def __call__(self, rows: Array, importance: Array, scales: Array, zeros: Array, codes: NDArray[np.uint8]) -> None:
        """Write scales, zeros and codes.

        rows: float32 [n, K], not changed. importance: float32 [K], the weight of a squared error in each column; its
        mean is 1. scales, zeros: float32 [n, blocks], written; a scale is a value of `grids.round_scale`, a zero point
        a whole number in [0, 2^bits - 1]. codes: uint8 [n, blocks * block_size], written; codes past column K are
        those of zero.
        """


@dataclass(frozen=True, slots=True)
class Method:
    """A quantization method. A module in `methods` defines one as `METHOD`; the module's name is the method's name.

    prepare: called once for a matrix with (spec, is_float16, moments); returns the function that quantizes its rows.
    is_float16: scales are stored as float16, otherwise as float32. moments: never None if `needs_moments`.
    needs_moments: the method needs second moments of the matrix's inputs, so it needs calibration text.
    uses_importance: the method weights errors by importance.
    fallback: the method for a matrix without calibration inputs; required if `needs_moments`.
    """

    prepare: Callable[[QuantSpec, bool, Moments | None], QuantizeRows]
    needs_moments: bool = False
    uses_importance: bool = True
    fallback: str | None = None


def round_to_grids(choose_grids: ChooseGrids) -> Callable[[QuantSpec, bool, Any], QuantizeRows]:
    """Return `Method.prepare` for a method that chooses a grid for each block and rounds each weight to nearest."""

    def prepare(spec: QuantSpec, is_float16: bool, _moments: Moments | None) -> QuantizeRows:
        max_code = float((1 << spec.bits) - 1)

        def quantize_rows(
            rows: Array, importance: Array, scales: Array, zeros: Array, codes: NDArray[np.uint8]
        ) -> None:
            choose_grids(rows, importance, spec.block_size, spec.bits, spec.symmetric, is_float16, scales, zeros)
            round_blocks(rows, scales, zeros, spec.block_size, max_code, codes)

        return quantize_rows

    return prepare
