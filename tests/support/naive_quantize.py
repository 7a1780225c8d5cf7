"""Plain-loop twins of the kernels of edgelm_export.quantize, in Python numbers: slow, the reference of their tests."""

from __future__ import annotations

import math

import numpy as np


def as_python(kernel):
    """Return the Python function of a compiled kernel, with all kernels that it calls also replaced by theirs."""
    function = kernel.py_func
    names = dict(function.__globals__)
    for name in function.__code__.co_names:
        if hasattr(names.get(name), "py_func"):
            names[name] = as_python(names[name])
    return type(function)(function.__code__, names)


def to_stored(scale, half):
    if half:
        stored = float(np.float16(min(max(abs(scale), 2.0**-24), 65504.0)))
    else:
        stored = float(np.float32(max(abs(scale), 2.0**-126)))
    return -stored if scale < 0 else stored


def nearest(value, scale, zero, top):
    return min(max(round(value / scale) + zero, 0), top)


def error(block, importance, scale, zero, top, power=2):
    total = 0.0
    for value, weight in zip(block, importance, strict=True):
        difference = value - (nearest(value, scale, zero, top) - zero) * scale
        total += weight * difference * difference if power == 2 else weight * abs(difference) ** power
    return total


def fitted_scale(block, importance, scale, zero, top):
    dot, square = 0.0, 0.0
    for value, weight in zip(block, importance, strict=True):
        code = nearest(value, scale, zero, top) - zero
        dot += weight * code * value
        square += weight * code * code
    return dot / square if square > 0 and dot != 0 else scale


def plain_grid(block, bits, symmetric, half):
    low, high, top = min(0.0, *block), max(0.0, *block), 2**bits - 1
    if symmetric:
        zero = 2 ** (bits - 1)
        return to_stored((low if -low >= high else high) / -zero, half), zero
    scale = to_stored(high / top - low / top, half)
    return scale, min(max(round(-low / scale), 0), top)


def searched_grid(block, importance, bits, symmetric, half, candidates):
    top = 2**bits - 1
    plain, zero = plain_grid(block, bits, symmetric, half)
    middle = min(0.0, *block) / 2 + max(0.0, *block) / 2
    trials = [(plain, zero)]
    for c in range(candidates):
        if symmetric:
            size = 0.6 + 0.6 * (c // 2) / max(candidates // 2 - 1, 1)
            trials.append((to_stored(plain * (size * (-1) ** c), half), zero))
        else:
            scale = to_stored(plain * (0.6 + 0.45 * c / max(candidates - 1, 1)), half)
            trials.append((scale, min(max(round(top / 2 - middle / scale), 0), top)))
    errors = [error(block, importance, *trial, top) for trial in trials]
    least = min(errors)
    scale, zero = trials[errors.index(least)]  # the first of equals
    for _ in range(4):
        trial = to_stored(fitted_scale(block, importance, scale, zero, top), half)
        if error(block, importance, trial, zero, top) >= least:
            break
        scale, least = trial, error(block, importance, trial, zero, top)
    return scale, zero


def hqq_grid(block, importance, bits, symmetric, half):
    top, beta = 2**bits - 1, 10.0
    best = plain_grid(block, bits, symmetric, half)
    least = error(block, importance, *best, top, power=0.7)
    scale, zero = best
    for _ in range(10):
        dot, square, offset, total = 0.0, 0.0, 0.0, 0.0
        for value, weight in zip(block, importance, strict=True):
            target = value / scale
            code = min(max(round(target + zero), 0), top) - zero
            missed = abs(target - code)
            if missed:
                target -= math.copysign(max(missed - missed ** (0.7 - 1.0) / beta, 0.0), value / scale - code)
            dot += weight * code * target
            square += weight * code * code
            offset += weight * (code - target)
            total += weight
        if square <= 0 or dot <= 0:
            break
        scale = to_stored(scale * dot / square, half)
        if not symmetric:
            zero = min(max(zero + offset / total, 0.0), top)
        beta *= 1.01
        whole = round(zero)
        fitted = to_stored(fitted_scale(block, importance, scale, whole, top), half)
        found = error(block, importance, fitted, whole, top, power=0.7)
        if found < least:
            best, least = (fitted, whole), found
    return best


def choose_grids(rows, importance, block_size, bits, symmetric, half, choose_grid):
    """float32 [N, K] -> scales and zero points float32 [N, blocks], by `choose_grid` for each block."""
    blocks = math.ceil(rows.shape[1] / block_size)
    scales, zeros = np.zeros((2, len(rows), blocks), np.float32)
    for n, row in enumerate(rows.tolist()):
        for b in range(blocks):
            block = row[b * block_size : (b + 1) * block_size]
            weights = importance.tolist()[b * block_size : (b + 1) * block_size]
            scales[n, b], zeros[n, b] = choose_grid(block, weights, bits, symmetric, half)
    return scales, zeros


def round_blocks(rows, scales, zeros, block_size, top):
    """float32 [N, K] -> codes uint8 [N, blocks * block_size]."""
    codes = np.repeat(zeros, block_size, axis=1).astype(np.uint8)
    for n, row in enumerate(rows.tolist()):
        for k, value in enumerate(row):
            codes[n, k] = nearest(value, float(scales[n, k // block_size]), float(zeros[n, k // block_size]), top)
    return codes


def round_and_spread_error(rows, factors, scales, zeros, groups, top):
    """-> codes uint8 [n, K], the residual float32 [n, K]."""
    codes, rows = np.zeros(rows.shape, np.uint8), rows.copy()
    for i in range(len(rows)):
        for k, g in enumerate(groups):
            value, scale, zero = float(rows[i, k]), float(scales[i, g]), float(zeros[i, g])
            codes[i, k] = nearest(value, scale, zero, top)
            missed = np.float32((value - (float(codes[i, k]) - zero) * scale) * float(factors[k, k]))
            rows[i, k] = 0
            for j in range(len(groups)):
                rows[i, j] = rows[i, j] + missed * factors[k, j]
    return codes, rows


def improve_codes(residual, hessian, scales, zeros, groups, top, codes):
    """-> the new codes, the new residual, how many changed."""
    codes, residual, changed = codes.copy(), residual.copy(), 0
    for i in range(len(codes)):
        for k, g in enumerate(groups):
            old, scale, zero = float(codes[i, k]), float(scales[i, g]), float(zeros[i, g])
            wanted = (old - zero) * scale + float(residual[i, k]) / float(hessian[k, k])
            codes[i, k] = nearest(wanted, scale, zero, top)
            if codes[i, k] != old:
                changed += 1
                move = np.float32((float(codes[i, k]) - old) * scale)
                for j in range(len(groups)):
                    residual[i, j] = residual[i, j] - move * hessian[k, j]
    return codes, residual, changed


def improve_scales(residual, hessian, scales, zeros, members, half, codes):
    """-> the new scales, the new residual, how many changed."""
    scales, residual, changed = scales.copy(), residual.copy(), 0
    for i in range(len(codes)):
        for b, columns in enumerate(members):
            columns = [k for k in columns if k >= 0]
            steps = {k: float(codes[i, k]) - float(zeros[i, b]) for k in columns}
            dot, square = 0.0, 0.0
            for at, k in enumerate(columns):
                dot += steps[k] * float(residual[i, k])
                product = 0.0
                for j in columns[:at]:
                    product += float(hessian[k, j]) * steps[j]
                square += steps[k] * (2.0 * product + float(hessian[k, k]) * steps[k])
            if square <= 0:
                continue
            old = float(scales[i, b])
            move = to_stored(old + dot / square, half) - old
            if 2 * move * dot <= move * move * square:
                continue
            scales[i, b], changed = old + move, changed + 1
            for k in columns:
                step = np.float32(move * steps[k])
                for j in range(residual.shape[1]):
                    residual[i, j] = residual[i, j] - step * hessian[k, j]
    return scales, residual, changed
