"""Plain-loop twins of the matrix kernels: written for reading, as an independent oracle.

Activations are rounded in float32, as the kernels must; everything else is float64.
"""

from __future__ import annotations

import math

import numpy as np


def silu(value):
    return float(value) / (1 + math.exp(-float(value)))


def normed(row, weight, epsilon):
    """A row divided by its root mean square, times a weight."""
    mean = sum(float(value) ** 2 for value in row) / len(row)
    return [float(value) / math.sqrt(mean + epsilon) * float(w) for value, w in zip(row, weight, strict=True)]


def quantize(row, block):
    """A row of activations -> codes, a list of integers for each block, and the blocks' scales."""
    codes, scales = [], []
    for start in range(0, len(row), block):
        values = [np.float32(value) for value in row[start : start + block]]
        largest = max(abs(value) for value in values)
        inverse = np.float32(127) / largest if largest > 1e-30 else np.float32(0)
        codes.append([int(np.rint(value * inverse)) for value in values])
        scales.append(float(largest / np.float32(127)))
    return codes, scales


def weight(codes, bits, column, block, index):
    """One weight of a matrix as MatMulNBits stores it, an integer around 0."""
    if bits == 8:
        return int(codes[column, block, index]) - 128
    byte = int(codes[column, block, index // 2])
    return (byte >> 4 if index % 2 else byte & 15) - 8


def matmul(x, codes, scales, bits, block, bias):
    """x [rows, K], codes [N, blocks, bytes], scales [N, blocks], bias [N] or None -> [rows, N]."""
    result = np.zeros((len(x), len(codes)))
    for r, row in enumerate(x):
        row_codes, row_scales = quantize(row, block)
        for n in range(len(codes)):
            total = 0.0 if bias is None else float(bias[n])
            for b, values in enumerate(row_codes):
                exact = sum(weight(codes, bits, n, b, i) * value for i, value in enumerate(values))
                total += exact * float(scales[n, b]) * row_scales[b]
            result[r, n] = total
    return result


def packed(codes, bits):
    """The bytes of every panel, in their order, as `edgelm.native.packing` describes them."""
    columns, blocks, size = codes.shape
    per_load = 8 if bits == 4 else 4
    loads = size * 8 // bits // per_load
    found = []
    for panel in range(-(-columns // 16)):
        for block in range(blocks):
            for load in range(loads):
                for lane in range(16):
                    column = 16 * panel + lane
                    for j in range(4):
                        if column >= columns:
                            found.append(0)
                            continue
                        first = weight(codes, bits, column, block, load * per_load + j)
                        if bits == 8:
                            found.append(first + 128)
                        else:
                            second = weight(codes, bits, column, block, load * per_load + 4 + j)
                            found.append(first + 8 | second + 8 << 4)
    return found
