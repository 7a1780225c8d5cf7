"""What calibration text says of a matrix's inputs: second moments, and how far the quantized model has drifted.

Knows nothing of codes: it hands GPTQ its factors and moves weights to where they make up for earlier errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgelmError

from . import triangular

Array = NDArray[np.float32]

DAMPING: Final = 0.01
"""Share of the mean second moment added to each: one per cent, as in GPTQ's step 3."""

FOLLOW_DAMPING: Final = 0.1
"""The same for `follow`, which would otherwise trust directions that the text hardly used."""

LOOKUP: Final = 0.3
"""How much the lookup weighs in a tied embedding beside the head."""


@dataclass(slots=True)
class Moments:
    """Sums over calibration positions for a matrix [N, K] with inputs x.

    second: float32 or float64 [K, K], of x x^T where x is what the matrix sees behind the quantized matrices before it.
    cross: [K, K], of (x_full - x) x^T, x_full being the input in the unquantized model; None: not known, or no
    difference. residual: [N, K], of (h_full - h) x^T where the matrix's output is added to a residual stream h; None:
    not added, or not known. count: positions summed over.
    """

    second: NDArray[Any]
    cross: NDArray[Any] | None = None
    residual: NDArray[Any] | None = None
    count: int = 0

    def damped(self, share: float = DAMPING) -> Array:
        """Return float32 [K, K], the second moments with `share` of their mean added, so that no channel is dead."""
        second = np.array(self.second, np.float32)
        diagonal = np.arange(len(second))
        second[diagonal, diagonal] = self.damped_diagonal(share)
        return second

    def damped_diagonal(self, share: float = DAMPING) -> Array:
        """Return float32 [K], the diagonal of `damped`."""
        diagonal = np.diag(self.second).astype(np.float32)
        mean = float(diagonal.mean(dtype=np.float64)) or 1.0
        damped: Array = diagonal + np.float32(share * mean)
        return damped


def follow(weight: Array, moments: Moments) -> Array:
    """Return float32 [N, K], the weights that on the quantized model's inputs come closest to the unquantized model.

    Minimizes |W' x - (W x_full + h_full - h)|^2 over the calibration positions, damped towards W: asymmetric
    calibration, the objective of GPTAQ (Li et al. 2025, arXiv:2504.02692), here solved before rounding instead of
    column by column, and with the drift of the residual stream that the matrix adds to. weight: float32 [N, K],
    unchanged, all N rows.
    """
    moved = np.zeros(weight.shape, np.float64)
    if moments.cross is not None:
        moved += weight @ moments.cross
    if moments.residual is not None:
        moved += moments.residual
    if not moved.any():
        return weight
    inverse = moments.damped(FOLLOW_DAMPING)
    triangular.factor(inverse)
    triangular.invert(inverse)  # of a lower triangle L with L L^T = the moments
    followed: Array = np.matmul(moved.astype(np.float32) @ inverse.T, inverse, dtype=np.float32)
    followed += weight
    return followed


def with_lookup(head: Moments, share: float = LOOKUP) -> Moments:
    """Return a tied embedding's moments: those of the head's inputs, with `share` of their mean added to each.

    A row is read as it is where its token is the input and multiplied with the inputs of the head elsewhere, so an
    error in any direction costs something.
    """
    second = np.array(head.second)
    diagonal = np.arange(len(second))
    second[diagonal, diagonal] += share * second[diagonal, diagonal].mean()
    return Moments(second, count=head.count)


def prepare(moments: Moments) -> tuple[NDArray[np.int64], Array, Array]:
    """Return (order, second, factors) for GPTQ: columns by falling moment, and the rest in that order.

    second: float32 [K, K], damped. factors: see `factors`. Raises EdgelmError where the moments are not positive
    definite, as those of no text are.
    """
    diagonal = moments.damped_diagonal()
    order = np.argsort(-diagonal, kind="stable")
    second = np.empty(moments.second.shape, np.float32)
    for row, k in zip(second, order, strict=True):
        row[:] = moments.second[k, order]
    second[np.arange(len(order)), np.arange(len(order))] = diagonal[order]
    try:
        return order, second, factors(second)
    except np.linalg.LinAlgError as error:
        raise EdgelmError(
            "gptq: the second moments are not positive definite: use other calibration text, or the method clip"
        ) from error


def factors(second: Array) -> Array:
    """Return float32 [K, K] for `gptq.round_columns`: V on and below the diagonal and -V^-T above, second = V^T V.

    second: float32 [K, K], damped. Raises numpy's LinAlgError where it is not positive definite.
    """
    table = second[::-1, ::-1].copy()
    triangular.factor(table)
    triangular.flip(table)
    triangular.fill_with_inverse(table)
    return table
