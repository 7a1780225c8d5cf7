"""What calibration text says of a matrix's inputs: second moments, and how far the quantized model has drifted.

Knows nothing of codes: it hands GPTQ its factors and moves weights to where they make up for earlier errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgelmError

Array = NDArray[np.float32]

DAMPING: Final = 0.01
"""Share of the mean second moment added to each: one per cent, as in GPTQ's step 3."""

FOLLOW_DAMPING: Final = 0.1
"""The same for `follow`, which would otherwise trust directions that the text hardly used."""

PANEL: Final = 256
"""Columns factored at once."""

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
        mean = float(second[diagonal, diagonal].mean(dtype=np.float64)) or 1.0
        second[diagonal, diagonal] += np.float32(share * mean)
        return second


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
    lower = cholesky(moments.damped(FOLLOW_DAMPING))
    inverse = _inverse(lower)  # of a lower triangle L with L L^T = the moments
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
    second = moments.damped()
    order = np.argsort(-np.diag(second), kind="stable")
    second = second[np.ix_(order, order)]
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
    lower = np.ascontiguousarray(cholesky(second[::-1, ::-1])[::-1, ::-1].T)
    inverse = _inverse(lower)
    for k in range(len(lower)):
        lower[k, k + 1 :] = -inverse[k + 1 :, k]
    return lower


def cholesky(second: Array) -> Array:
    """Return the lower triangle L float32 [K, K] with L L^T = second, zeros above; numpy's own computes in float64.

    Blocks of columns in turn: each is factored, and what it explains is taken off the rest. Raises numpy's LinAlgError
    where `second` is not positive definite.
    """
    lower = np.tril(second)
    size = len(lower)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        corner = np.linalg.cholesky(lower[start:stop, start:stop].astype(np.float64)).astype(np.float32)
        lower[start:stop, start:stop] = corner
        below = lower[stop:, start:stop] @ _inverse(corner).T
        lower[stop:, start:stop] = below
        for first in range(stop, size, PANEL):  # the lower half of the rest, a few columns at a time
            columns = slice(first, min(first + PANEL, size))
            lower[first:, columns] -= below[first - stop :] @ below[first - stop : columns.stop - stop].T
        lower[start:stop, stop:] = 0  # where the last line went past the diagonal
    return lower


def _inverse(lower: Array) -> Array:
    """Inverse of a lower triangular matrix, halves at a time."""
    size = len(lower)
    if size <= 64:
        return np.tril(np.linalg.inv(lower)).astype(np.float32)
    half = size // 2
    inverse = np.zeros_like(lower)
    inverse[:half, :half] = _inverse(lower[:half, :half])
    inverse[half:, half:] = _inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    return inverse
