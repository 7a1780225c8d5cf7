"""Plain-loop twin of edgelm_export.quantize.rounding: slow, in Python's own numbers, and the oracle of its tests."""

from __future__ import annotations

import math

import numpy as np


def squared_error(block, scale, zero):
    total = 0.0
    for value in block:
        code = min(max(round(value * (1.0 / scale)), -zero), zero - 1)
        total += (value - code * scale) * (value - code * scale)
    return total


def choose_scale(block, zero, candidates):
    extreme = 0.0
    for value in block:
        if abs(value) > abs(extreme):
            extreme = value
    scale = extreme / -zero
    if abs(scale) < 2.0**-126:
        return 1.0
    if not candidates:
        return scale
    trials = [
        scale * (0.70 + 0.50 * (c // 2) / max(candidates // 2 - 1, 1)) * (1.0 if c % 2 == 0 else -1.0)
        for c in range(candidates)
    ]
    best = min([scale, *trials], key=lambda trial: squared_error(block, trial, zero))  # the first of equals
    codes = [min(max(round(value / best), -zero), zero - 1) for value in block]
    dot, square = 0.0, 0.0
    for code, value in zip(codes, block, strict=True):
        dot += code * value
        square += code * code
    if square > 0 and dot != 0 and squared_error(block, dot / square, zero) < squared_error(block, best, zero):
        return dot / square
    return best


def round_blocks(weight, block_size, bits, candidates):
    """float32 [N, K] -> codes uint8 [N, blocks * block_size], scales float32 [N, blocks]."""
    rows, columns = weight.shape
    blocks = math.ceil(columns / block_size)
    zero = 1 << (bits - 1)
    codes = np.full((rows, blocks * block_size), zero, np.uint8)
    scales = np.zeros((rows, blocks), np.float32)
    for n in range(rows):
        for b in range(blocks):
            part = range(b * block_size, min((b + 1) * block_size, columns))
            stored = np.float32(choose_scale([float(weight[n, k]) for k in part], zero, candidates))
            scales[n, b] = stored
            for k in part:
                codes[n, k] = min(max(round(float(weight[n, k]) / float(stored)), -zero), zero - 1) + zero
    return codes, scales
