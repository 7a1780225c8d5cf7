"""GPTQ and the descent after it: codes chosen one column after the other, as compiled loops.

Frantar et al. 2022 (arXiv:2210.17323), "The GPTQ Algorithm", steps 1 and 3: columns are rounded in turn and what each
leaves is spread over the columns to come, by the Cholesky factor of the inverse of H, the inputs' second moments. From
its authors' program come the order, columns of large moments first ("act-order"), and grids fixed beforehand ("static
groups"). Then, by the coordinate descent of QuantEase (Behdin et al. 2023, arXiv:2309.01885), every code is set to its
best value given all others, and every scale too (our addition), in a few sweeps.

With H = V^T V for a lower triangular V and the upper U = V^-T, so that H^-1 = U^T U, a column's scaled error e = (x_k -
q_k) / U_kk changes the columns to come by -e U_k and the residual (w - q) H of those done by +e V_k. Both go into one
matrix of factors, so one pass over a row yields the codes and the residual that the descent starts from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .grids import nearest_code, round_scale

ROW_TILE = 16
"""Rows that pass over the factors together, so that these come from memory once for all of them."""

COLUMN_BLOCK = 16
"""Columns whose errors reach the columns outside of them together."""

Array = NDArray[np.float32]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _axpy(factor: float, vector: Array, to: Array) -> None:
    """Add a multiple of a vector to another, in place."""
    for j in range(to.shape[0]):
        to[j] += factor * vector[j]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_outer_products(factors: Array, table: Array, lines: Any, first: int, last: int, rows: Array) -> None:
    """Add factors[:, m] * table[lines[m]] to rows, for one m after the other, in columns [first, last).

    The same sums as by `_axpy`, and in the same order; but eight at a time, while what they need is near.
    """
    n, count = factors.shape
    size, m = last - first, 0
    while m + 8 <= count:
        t0, t1 = table[lines[m], first:last], table[lines[m + 1], first:last]
        t2, t3 = table[lines[m + 2], first:last], table[lines[m + 3], first:last]
        t4, t5 = table[lines[m + 4], first:last], table[lines[m + 5], first:last]
        t6, t7 = table[lines[m + 6], first:last], table[lines[m + 7], first:last]
        for i in range(n):
            f0, f1, f2, f3 = factors[i, m], factors[i, m + 1], factors[i, m + 2], factors[i, m + 3]
            f4, f5, f6, f7 = factors[i, m + 4], factors[i, m + 5], factors[i, m + 6], factors[i, m + 7]
            row = rows[i, first:last]
            for j in range(size):
                value = row[j]
                value += f0 * t0[j]
                value += f1 * t1[j]
                value += f2 * t2[j]
                value += f3 * t3[j]
                value += f4 * t4[j]
                value += f5 * t5[j]
                value += f6 * t6[j]
                value += f7 * t7[j]
                row[j] = value
        m += 8
    while m < count:
        for i in range(n):
            _axpy(factors[i, m], table[lines[m], first:last], rows[i, first:last])
        m += 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_columns(
    rows: Array, factors: Array, scales: Array, zeros: Array, groups: Any, max_code: float, codes: Any
) -> None:
    """Choose codes column by column.

    rows: float32 [n, K], changed in place: weights before, the residual (w - q) H after. factors: float32 [K, K], V on
    and below the diagonal and -U above it. scales, zeros: float32 [n, blocks]. groups: int64 [K], a column's block.
    codes: uint8 [n, K], written.
    """
    n, columns = rows.shape
    errors = np.empty((n, COLUMN_BLOCK), np.float32)
    for start in range(0, columns, COLUMN_BLOCK):
        stop = min(start + COLUMN_BLOCK, columns)
        for k in range(start, stop):
            g = groups[k]
            for i in range(n):
                value, scale, zero = float(rows[i, k]), float(scales[i, g]), float(zeros[i, g])
                code = nearest_code(value, scale, zero, max_code)
                codes[i, k] = np.uint8(code)
                error = np.float32((value - (code - zero) * scale) * float(factors[k, k]))
                errors[i, k - start] = error
                rows[i, k] = np.float32(0.0)
                _axpy(error, factors[k, start:stop], rows[i, start:stop])
        lines = np.arange(start, stop)
        _add_outer_products(errors[:, : stop - start], factors, lines, 0, start, rows)
        _add_outer_products(errors[:, : stop - start], factors, lines, stop, columns, rows)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def improve_codes(
    residual: Array, hessian: Array, scales: Array, zeros: Array, groups: Any, max_code: float, codes: Any
) -> int:
    """Set every code in turn to its best value given the others; return how many changed.

    residual: float32 [n, K], (w - q) H, changed in place like codes. second: float32 [K, K], H.
    """
    n, columns = residual.shape
    changed = 0
    for k in range(columns):
        g = groups[k]
        for i in range(n):
            old, scale, zero = float(codes[i, k]), float(scales[i, g]), float(zeros[i, g])
            wanted = (old - zero) * scale + float(residual[i, k]) / float(hessian[k, k])
            code = nearest_code(wanted, scale, zero, max_code)
            if code != old:
                codes[i, k] = np.uint8(code)
                move = np.float32((code - old) * scale)
                _axpy(-move, hessian[k], residual[i])
                changed += 1
    return changed


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def improve_scales(
    residual: Array, hessian: Array, scales: Array, zeros: Array, members: Any, is_float16: bool, codes: Any
) -> int:
    """Set every scale in turn to its best stored value given the codes and the others; return how many changed.

    members: int64 [blocks, block_size], the columns of a block, then -1s where it is short. residual and scales
    are changed in place.
    """
    n = residual.shape[0]
    changed = 0
    moves = np.zeros(n, np.float64)
    steps = np.empty((n, members.shape[1]), np.float32)
    for b in range(members.shape[0]):
        size = 0
        while size < members.shape[1] and members[b, size] >= 0:
            size += 1
        for i in range(n):
            dot, square, zero = 0.0, 0.0, float(zeros[i, b])
            for m in range(size):
                k = members[b, m]
                code = float(codes[i, k]) - zero
                dot += code * float(residual[i, k])
                product = 0.0
                for o in range(m):
                    j = members[b, o]
                    product += float(hessian[k, j]) * (float(codes[i, j]) - zero)
                square += code * (2.0 * product + float(hessian[k, k]) * code)
            moves[i] = 0.0
            if square > 0.0:
                old = float(scales[i, b])
                stored = round_scale(old + dot / square, is_float16)
                move = stored - old
                if 2.0 * move * dot > move * move * square:
                    moves[i] = move
                    scales[i, b] = stored
                    changed += 1
        for m in range(size):
            k = members[b, m]
            for i in range(n):
                steps[i, m] = np.float32(-moves[i] * (float(codes[i, k]) - float(zeros[i, b])))
        _add_outer_products(steps[:, :size], hessian, members[b, :size], 0, residual.shape[1], residual)
    return changed
