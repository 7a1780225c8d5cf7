"""Round column by column and correct each error in later columns (GPTQ); needs calibration text.

Frantar et al. 2022 (arXiv:2210.17323), "The GPTQ Algorithm", steps 1 and 3: columns are rounded in turn, and the error
of each is spread over the columns after it by the Cholesky factor of H^-1. H is the second moments of the matrix's
inputs. As in the authors' program, columns with large moments come first ("act-order") and the grids are fixed before
("static groups"). Then the coordinate descent of QuantEase (Behdin et al. 2023, arXiv:2309.01885) sets each code to its
best value given all others, in a few sweeps; and, our addition, each scale.

With H = V^T V for a lower triangular V, and the upper triangular U = V^-T, H^-1 = U^T U. The scaled error e = (x_k -
q_k) / U_kk of column k changes the columns after it by -e U_k, and the residual (w - q) H of the columns before it by
+e V_k. Both are in one matrix of factors, so one pass over a row gives its codes and the residual where descent starts.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from edgelm.errors import EdgelmError

from .. import triangular
from ..grids import nearest_code, round_scale
from ..method import ROW_TILE, Array, Method, QuantizeRows
from ..moments import Moments
from ..spec import QuantSpec
from .clip import METHOD as CLIP

COLUMN_BLOCK: Final = 16
"""Columns whose errors are added to the other columns together. Rows are processed `ROW_TILE` at a time, so that the
factors are read from memory once for all of them."""

DESCENT_ROUNDS: Final = 1
"""Rounds after GPTQ; each improves codes until they settle, then scales. A second round changes nothing measurable
(stories260K: KL .0487 and .0486) and takes half as long as GPTQ itself."""

MAX_SWEEPS: Final = 8
"""Most sweeps over the codes in a round. Few codes change after the first."""


def prepare(spec: QuantSpec, is_float16: bool, moments: Moments | None) -> QuantizeRows:
    """See `Method`. Raises `EdgelmError` if the moments are not positive definite."""
    if moments is None:
        raise AssertionError("gptq without moments")
    order, hessian, factors = order_and_factor(moments)
    groups = order // spec.block_size
    start_grids = CLIP.prepare(spec, is_float16, None)
    max_code = float((1 << spec.bits) - 1)

    def quantize_rows(rows: Array, importance: Array, scales: Array, zeros: Array, codes: NDArray[np.uint8]) -> None:
        start_grids(rows, importance, scales, zeros, codes)
        block_columns = np.full((scales.shape[1], spec.block_size), -1, np.int64)
        block_columns.reshape(-1)[order] = np.arange(rows.shape[1])
        for i in range(0, len(rows), ROW_TILE):
            part = slice(i, i + ROW_TILE)
            residual = np.take(rows[part], order, axis=1)  # rows[part][:, order] would not be contiguous
            chosen = np.empty(residual.shape, np.uint8)
            grids = scales[part], zeros[part]
            round_and_spread_error(residual, factors, *grids, groups, max_code, chosen)
            for _ in range(DESCENT_ROUNDS):
                for _ in range(MAX_SWEEPS):
                    if not improve_codes(residual, hessian, *grids, groups, max_code, chosen):
                        break
                improve_scales(residual, hessian, *grids, block_columns, is_float16, chosen)
            improve_codes(residual, hessian, *grids, groups, max_code, chosen)
            codes[part, order] = chosen

    return quantize_rows


def order_and_factor(moments: Moments) -> tuple[NDArray[np.int64], Array, Array]:
    """Return (order, hessian, factors).

    order: int64 [K], columns by falling second moment. hessian: float32 [K, K], damped, in that order. factors: those
    of `gptq_factors` for it. Raises `EdgelmError` if the moments are not positive definite; sums over real text are.
    """
    diagonal = moments.damped_diagonal()
    order = np.argsort(-diagonal, kind="stable")
    hessian = np.empty(moments.hessian.shape, np.float32)
    for row, k in zip(hessian, order, strict=True):
        row[:] = moments.hessian[k, order]
    hessian[np.arange(len(order)), np.arange(len(order))] = diagonal[order]
    try:
        return order, hessian, gptq_factors(hessian)
    except np.linalg.LinAlgError as error:
        raise EdgelmError(
            "gptq: the second moments are not positive definite; use other calibration text, or --method clip"
        ) from error


def gptq_factors(hessian: Array) -> Array:
    """Return float32 [K, K]: V, with hessian = V^T V, on and below the diagonal and -V^-T above it.

    hessian: float32 [K, K], damped, not changed. Raises numpy's LinAlgError if it is not positive definite.
    """
    table = hessian[::-1, ::-1].copy()
    triangular.factor_cholesky(table)
    triangular.flip_antidiagonal(table)
    triangular.write_inverse_transpose(table)
    return table


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _axpy(factor: float, vector: Array, target: Array) -> None:
    """Add factor * vector to `target`, in place."""
    for j in range(target.shape[0]):
        target[j] += factor * vector[j]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_outer_products(factors: Array, table: Array, row_indices: Any, first: int, last: int, rows: Array) -> None:
    """Add factors[:, m] * table[row_indices[m]] to rows, in the order of m, in columns [first, last).

    The result equals that of `_axpy` for each m, bit by bit. Eight at a time read and write rows less often.
    """
    n, count = factors.shape
    size, m = last - first, 0
    while m + 8 <= count:
        t0, t1 = table[row_indices[m], first:last], table[row_indices[m + 1], first:last]
        t2, t3 = table[row_indices[m + 2], first:last], table[row_indices[m + 3], first:last]
        t4, t5 = table[row_indices[m + 4], first:last], table[row_indices[m + 5], first:last]
        t6, t7 = table[row_indices[m + 6], first:last], table[row_indices[m + 7], first:last]
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
            _axpy(factors[i, m], table[row_indices[m], first:last], rows[i, first:last])
        m += 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_and_spread_error(
    rows: Array, factors: Array, scales: Array, zeros: Array, groups: Any, max_code: float, codes: Any
) -> None:
    """Choose codes column by column, and spread the rounding error of each over the columns that follow.

    rows: float32 [n, K], changed in place from weights to the residual (w - q) H. factors: float32 [K, K], V on and
    below the diagonal and -U above it. scales, zeros: float32 [n, blocks]. groups: int64 [K], the block of each column.
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
        columns_done = np.arange(start, stop)
        _add_outer_products(errors[:, : stop - start], factors, columns_done, 0, start, rows)
        _add_outer_products(errors[:, : stop - start], factors, columns_done, stop, columns, rows)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def improve_codes(
    residual: Array, hessian: Array, scales: Array, zeros: Array, groups: Any, max_code: float, codes: Any
) -> int:
    """Set each code in turn to its best value given the others; return how many changed.

    residual: float32 [n, K], (w - q) H, changed in place. hessian: float32 [K, K], H. codes: uint8 [n, K], changed in
    place. The other arguments are those of `round_and_spread_error`.
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
    residual: Array, hessian: Array, scales: Array, zeros: Array, block_columns: Any, is_float16: bool, codes: Any
) -> int:
    """Set each scale in turn to its best stored value given the codes and the other scales; return how many changed.

    block_columns: int64 [blocks, block_size], the columns of each block; -1 after the last column of a short block.
    residual and scales are changed in place. The other arguments are those of `improve_codes`.
    """
    n = residual.shape[0]
    changed = 0
    moves = np.zeros(n, np.float64)
    steps = np.empty((n, block_columns.shape[1]), np.float32)
    for b in range(block_columns.shape[0]):
        size = 0
        while size < block_columns.shape[1] and block_columns[b, size] >= 0:
            size += 1
        for i in range(n):
            dot, square, zero = 0.0, 0.0, float(zeros[i, b])
            for m in range(size):
                k = block_columns[b, m]
                code = float(codes[i, k]) - zero
                dot += code * float(residual[i, k])
                product = 0.0
                for o in range(m):
                    j = block_columns[b, o]
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
            k = block_columns[b, m]
            for i in range(n):
                steps[i, m] = np.float32(-moves[i] * (float(codes[i, k]) - float(zeros[i, b])))
        _add_outer_products(steps[:, :size], hessian, block_columns[b, :size], 0, residual.shape[1], residual)
    return changed


METHOD: Final = Method(prepare, needs_moments=True, fallback="clip")
