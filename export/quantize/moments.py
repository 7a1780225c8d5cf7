"""Statistics of a matrix's inputs over calibration text: second moments, and the drift of the quantized model.

Moves weights to compensate for the errors of the matrices before. Does not know how codes are chosen or packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import triangular

Array = NDArray[np.float32]

DAMPING: Final = 0.05
"""Damping of the second moments: the share of a channel's own moment, or of the median if that is larger, added to it.
GPTQ's step 3 adds 1 % of the mean, but one channel of outliers makes that larger than the moments of all others. The
moments of a large model come from only 8,000 to 12,000 positions, not GPTQ's 262,144: with 1 % the result follows their
noise."""

DRIFT_DAMPING: Final = 0.1
"""Damping in `compensate_drift`; with less it would follow directions that hardly occur in the text."""

LOOKUP_WEIGHT: Final = 0.3
"""Weight of the lookup relative to the head in a tied embedding."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Calibration positions that are used to check a matrix [N, K], not to fit it.

    inputs: float32 [n, K], the matrix's inputs in the quantized model. target: float32 [n, N], the wanted outputs; None
    means the unquantized matrix's outputs for the same inputs. Both are weighted like the sums of `Moments`.
    """

    inputs: Array
    target: Array | None = None


@dataclass(slots=True)
class Moments:
    """Weighted sums over calibration positions for a matrix [N, K] with inputs x.

    hessian: float32 or float64 [K, K], the sum of x x^T with x the input in the partly quantized model: the Hessian of
    the squared output error. input_drift: [K, K], the sum of (x_full - x) x^T with x_full the input in the unquantized
    model; None if unknown or zero. residual_drift: [N, K], the sum of (h_full - h) x^T if the output is added to a
    residual stream h; otherwise None. All are sums over the same positions. count: number of positions. held_out:
    positions in none of the sums.
    """

    hessian: NDArray[Any]
    input_drift: NDArray[Any] | None = None
    residual_drift: NDArray[Any] | None = None
    count: int = 0
    held_out: HeldOut | None = None

    def damped_hessian(self, share: float = DAMPING) -> Array:
        """Return float32 [K, K]: the second moments with the damped diagonal."""
        hessian = np.array(self.hessian, np.float32)
        diagonal = np.arange(len(hessian))
        hessian[diagonal, diagonal] = self.damped_diagonal(share)
        return hessian

    def damped_diagonal(self, share: float = DAMPING) -> Array:
        """Return float32 [K]: the diagonal of the second moments, damped; always positive."""
        diagonal = np.diag(self.hessian).astype(np.float64)
        used = diagonal[diagonal > 0]
        typical = float(np.median(used)) if len(used) else 1.0
        damped: Array = (diagonal + share * np.maximum(diagonal, typical)).astype(np.float32)
        return damped


def compensate_drift(weight: Array, moments: Moments) -> Array:
    """Return float32 [N, K]: weights that compensate for the drift of the matrix's inputs.

    Minimizes |W' x - (W x_full + h_full - h)|^2 over the calibration positions, damped towards W. This is asymmetric
    calibration, the objective of GPTAQ (Li et al. 2025, arXiv:2504.02692), solved before rounding instead of column by
    column, with the drift of the residual stream included. If there are held-out positions, W moves towards W' by the
    fraction in [0, 1] that gives the least error on them. weight: float32 [N, K], all N rows, not changed.
    """
    moved = np.zeros(weight.shape, np.float64)
    if moments.input_drift is not None:
        moved += weight @ moments.input_drift
    if moments.residual_drift is not None:
        moved += moments.residual_drift
    if not moved.any():
        return weight
    inverse = moments.damped_hessian(DRIFT_DAMPING)
    scale = 1 / np.sqrt(np.diag(inverse))  # scaled to ones on the diagonal
    inverse *= scale[:, None]
    inverse *= scale
    triangular.factor_cholesky(inverse)
    triangular.invert_lower_triangle(inverse)  # inverse of L with L L^T = the scaled moments
    move: Array = np.matmul((moved * scale).astype(np.float32) @ inverse.T, inverse, dtype=np.float32)
    move *= scale
    if moments.held_out is not None:
        move *= np.float32(_step_length(weight, move, moments.held_out))
    return weight + move


def _step_length(weight: Array, move: Array, held: HeldOut) -> float:
    """Return the fraction in [0, 1] of a move that brings a matrix's output closest to the target."""
    target = held.inputs @ weight.T if held.target is None else held.target
    missing = target - held.inputs @ weight.T
    step = held.inputs @ move.T
    size = float(np.square(step, dtype=np.float64).sum())
    if not np.isfinite(size) or size == 0.0:
        return 0.0
    return min(max(float(np.sum(step * missing, dtype=np.float64)) / size, 0.0), 1.0)


def output_error(weight: Array, held: HeldOut, read: Array) -> float:
    """Return the squared output error on held-out positions of rows that read back as `read` [n, K]."""
    found = held.inputs @ read.T
    expected = held.inputs @ weight.T if held.target is None else held.target
    return float(np.square(found - expected, dtype=np.float64).sum())


def add_lookup_weight(head: Moments, share: float = LOOKUP_WEIGHT) -> Moments:
    """Return the moments of a tied embedding: the head's, with `share` of their mean added to the diagonal.

    A row is used as a lookup result for its token and multiplied with the head's inputs for all others, so an error in
    any direction has a cost.
    """
    hessian = np.array(head.hessian)
    diagonal = np.arange(len(hessian))
    hessian[diagonal, diagonal] += share * hessian[diagonal, diagonal].mean()
    return Moments(hessian, count=head.count, held_out=head.held_out)
