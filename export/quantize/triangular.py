"""Triangular factors of large float32 matrices in place; numpy's functions would copy them to float64."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

PANEL: Final = 256
"""Columns processed at a time."""

MAX_DIRECT_SIZE: Final = 64
"""Triangles up to this size are inverted by numpy."""

Array = NDArray[np.float32]


def factor_cholesky(matrix: Array) -> None:
    """Replace a symmetric matrix [n, n] by the lower triangular L with L L^T = matrix; zeros above the diagonal.

    Reads only the lower half. Panels of columns are factored in turn, and their product is subtracted from the rest.
    Raises numpy's LinAlgError if the matrix is not positive definite.
    """
    size = len(matrix)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        corner = np.linalg.cholesky(matrix[start:stop, start:stop].astype(np.float64)).astype(np.float32)
        matrix[start:stop, start:stop] = corner
        matrix[start:stop, stop:] = 0
        invert_lower_triangle(corner)
        below = matrix[stop:, start:stop] @ corner.T
        matrix[stop:, start:stop] = below
        for first in range(stop, size, PANEL):  # the lower half of the rest, one panel at a time
            last = min(first + PANEL, size)
            matrix[first:, first:last] -= below[first - stop :] @ below[first - stop : last - stop].T


def invert_lower_triangle(lower: Array) -> None:
    """Replace a lower triangle [n, n] by its inverse, recursively by halves."""
    size = len(lower)
    if size <= MAX_DIRECT_SIZE:
        lower[:] = np.tril(np.linalg.inv(lower))
        return
    half = size // 2
    invert_lower_triangle(lower[:half, :half])
    invert_lower_triangle(lower[half:, half:])
    lower[half:, :half] = -lower[half:, half:] @ (lower[half:, :half] @ lower[:half, :half])


def write_inverse_transpose(lower: Array) -> None:
    """Write -L^-T above the diagonal of a lower triangle L [n, n], recursively by halves."""
    size = len(lower)
    if size <= MAX_DIRECT_SIZE:
        lower -= np.triu(np.linalg.inv(lower).T, 1)
        return
    half = size // 2
    first, second, both = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    write_inverse_transpose(first)
    write_inverse_transpose(second)
    product = both @ _inverse_rows(first, 0, half)
    for start in range(0, len(second), PANEL):
        stop = start + PANEL
        lower[:half, half + start : half + stop] = (_inverse_rows(second, start, stop) @ product).T


def flip_antidiagonal(matrix: Array) -> None:
    """Mirror a matrix [n, n] along its antidiagonal, in place."""
    last = len(matrix) - 1
    for k in range(last):
        row, column = matrix[k, : last - k], matrix[k + 1 :, last - k][::-1]
        row[:], column[:] = column.copy(), row.copy()


def _inverse_rows(filled: Array, start: int, stop: int) -> Array:
    """Return rows [start, stop) of L^-1 [n, n] from an L with -L^-T above its diagonal."""
    rows = -np.tril(filled[:, start:stop].T, start - 1)
    diagonal = np.arange(start, start + len(rows))
    rows[diagonal - start, diagonal] = 1 / filled[diagonal, diagonal]
    return rows
