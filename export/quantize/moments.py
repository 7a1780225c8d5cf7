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
"""Share of a channel's own second moment, or of the channels' median where that is more, that is added to it. GPTQ's
step 3 adds one per cent of their mean, which a single channel of outliers makes larger than what all others say. Here
the moments of a large model come from 8,000 to 12,000 positions, not 262,144: one per cent follows their noise."""

DRIFT_DAMPING: Final = 0.1
"""Share for `compensate_drift`, which would otherwise trust directions that the text hardly used."""

LOOKUP_WEIGHT: Final = 0.3
"""How much the lookup weighs in a tied embedding beside the head."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Calibration positions that a matrix [N, K] is tried on and not fitted to.

    inputs: float32 [n, K], what the matrix multiplies in the quantized model. target: float32 [n, N], what its output
    is to be there, or None where that is the unquantized matrix's output for the same inputs. Both are weighted as the
    sums of `Moments` are.
    """

    inputs: Array
    target: Array | None = None


@dataclass(slots=True)
class Moments:
    """Weighted sums over calibration positions for a matrix [N, K] with inputs x.

    second: float32 or float64 [K, K], of x x^T where x is what the matrix sees behind the quantized matrices before it:
    the Hessian of its squared output error. cross: [K, K], of (x_full - x) x^T, x_full being the input in the
    unquantized model; None: not known, or no difference. residual: [N, K], of (h_full - h) x^T where the matrix's
    output is added to a residual stream h; None: not added, or not known. All three are sums over the same positions.
    count: positions summed over. held_back: positions that are in none of the sums.
    """

    hessian: NDArray[Any]
    input_drift: NDArray[Any] | None = None
    residual_drift: NDArray[Any] | None = None
    count: int = 0
    held_out: HeldOut | None = None

    def damped_hessian(self, share: float = DAMPING) -> Array:
        """Return float32 [K, K], the second moments with `share` of each on the diagonal added to it."""
        hessian = np.array(self.hessian, np.float32)
        diagonal = np.arange(len(hessian))
        hessian[diagonal, diagonal] = self.damped_diagonal(share)
        return hessian

    def damped_diagonal(self, share: float = DAMPING) -> Array:
        """Return float32 [K], the diagonal of `damped`; no channel is dead."""
        diagonal = np.diag(self.hessian).astype(np.float64)
        used = diagonal[diagonal > 0]
        typical = float(np.median(used)) if len(used) else 1.0
        damped: Array = (diagonal + share * np.maximum(diagonal, typical)).astype(np.float32)
        return damped


def compensate_drift(weight: Array, moments: Moments) -> Array:
    """Return float32 [N, K], the weights that on the quantized model's inputs come closest to the unquantized model.

    Minimizes |W' x - (W x_full + h_full - h)|^2 over the calibration positions, damped towards W: asymmetric
    calibration, the objective of GPTAQ (Li et al. 2025, arXiv:2504.02692), here solved before rounding instead of
    column by column, and with the drift of the residual stream that the matrix adds to. Where there are held-back
    positions, W moves only as far towards W' as serves them best, and not at all where it does not. weight: float32
    [N, K], unchanged, all N rows.
    """
    moved = np.zeros(weight.shape, np.float64)
    if moments.input_drift is not None:
        moved += weight @ moments.input_drift
    if moments.residual_drift is not None:
        moved += moments.residual_drift
    if not moved.any():
        return weight
    inverse = moments.damped_hessian(DRIFT_DAMPING)
    scale = 1 / np.sqrt(np.diag(inverse))  # factors of a matrix with ones on its diagonal
    inverse *= scale[:, None]
    inverse *= scale
    triangular.factor_cholesky(inverse)
    triangular.invert_lower_triangle(inverse)  # of a lower triangle L with L L^T = the scaled moments
    move: Array = np.matmul((moved * scale).astype(np.float32) @ inverse.T, inverse, dtype=np.float32)
    move *= scale
    if moments.held_out is not None:
        move *= np.float32(_step_length(weight, move, moments.held_out))
    return weight + move


def _step_length(weight: Array, move: Array, held: HeldOut) -> float:
    """Return the share in [0, 1] of a move that brings a matrix's output closest to the target."""
    target = held.inputs @ weight.T if held.target is None else held.target
    missing = target - held.inputs @ weight.T
    step = held.inputs @ move.T
    size = float(np.square(step, dtype=np.float64).sum())
    if not np.isfinite(size) or size == 0.0:
        return 0.0
    return min(max(float(np.sum(step * missing, dtype=np.float64)) / size, 0.0), 1.0)


def output_error(weight: Array, held: HeldOut, read: Array) -> float:
    """Return the squared output error, on the held-back positions, of rows of a matrix stored as `read` [n, K]."""
    found = held.inputs @ read.T
    expected = held.inputs @ weight.T if held.target is None else held.target
    return float(np.square(found - expected, dtype=np.float64).sum())


def add_lookup_weight(head: Moments, share: float = LOOKUP_WEIGHT) -> Moments:
    """Return a tied embedding's moments: those of the head's inputs, with `share` of their mean added to each.

    A row is read as it is where its token is the input and multiplied with the inputs of the head elsewhere, so an
    error in any direction costs something.
    """
    hessian = np.array(head.hessian)
    diagonal = np.arange(len(hessian))
    hessian[diagonal, diagonal] += share * hessian[diagonal, diagonal].mean()
    return Moments(hessian, count=head.count, held_out=head.held_out)
