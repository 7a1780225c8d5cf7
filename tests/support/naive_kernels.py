"""The matrix kernels as plain loops: an independent oracle.

Activations are quantized in float32, as in the kernels; everything else is float64.
"""

from __future__ import annotations

import math

import numpy as np


def silu(value):
    return float(value) / (1 + math.exp(-float(value)))


def normed(row, weight, epsilon):
    """Return a row divided by its root mean square, times a weight."""
    mean = sum(float(value) ** 2 for value in row) / len(row)
    return [float(value) / math.sqrt(mean + epsilon) * float(w) for value, w in zip(row, weight, strict=True)]


def quantize(row, block, bits=4):
    """Return the codes of a row of activations, a list of integers for each block, and the blocks' scales.

    For 8-bit weights codes have 16 bits instead of 8.
    """
    max_code = np.float32(127 * 257 if bits == 8 else 127)
    codes, scales = [], []
    for start in range(0, len(row), block):
        values = [np.float32(value) for value in row[start : start + block]]
        largest = max(abs(value) for value in values)
        inverse = max_code / largest if largest > 1e-30 else np.float32(0)
        codes.append([int(np.rint(value * inverse)) for value in values])
        scales.append(float(largest / max_code))
    return codes, scales


def weight(codes, bits, column, block, index):
    """Return one weight of a matrix in the layout of MatMulNBits, an integer around 0.

    With 5 and 6 bits the high bits of a block lie after the low 4 bits, the first weight in the lowest bits of a byte.
    """
    if bits == 8:
        return int(codes[column, block, index]) - 128
    byte = int(codes[column, block, index // 2])
    code = byte >> 4 if index % 2 else byte & 15
    if bits > 4:
        above, size = bits - 4, codes.shape[2] * 8 // bits
        first = index * above
        code += (int(codes[column, block, size // 2 + first // 8]) >> first % 8 & 2**above - 1) << 4
    return code - 2 ** (bits - 1)


def row(codes, scales, bits, column):
    """Return the weights of a column with their scales."""
    blocks, size = codes.shape[1], codes.shape[2] * 8 // bits
    return [(weight(codes, bits, column, b, i), scales[column, b]) for b in range(blocks) for i in range(size)]


def matmul(x, codes, scales, bits, block, bias):
    """Return x W + bias: x [rows, K], codes [N, blocks, bytes], scales [N, blocks], bias [N] or None -> [rows, N]."""
    result = np.zeros((len(x), len(codes)))
    for r, row in enumerate(x):
        row_codes, row_scales = quantize(row, block, bits)
        for n in range(len(codes)):
            total = 0.0 if bias is None else float(bias[n])
            for b, values in enumerate(row_codes):
                exact = sum(weight(codes, bits, n, b, i) * value for i, value in enumerate(values))
                total += exact * float(scales[n, b]) * row_scales[b]
            result[r, n] = total
    return result


def packed(codes, bits):
    """Return the bytes of all panels in order, as `edgelm.kernels.rewrite.panel_layout` describes them."""
    columns, blocks, size = codes.shape
    found = []
    for panel in range(-(-columns // 16)):
        for block in range(blocks):

            def code(n, index, panel=panel, block=block):
                column = 16 * panel + n
                return weight(codes, bits, column, block, index) + 2 ** (bits - 1) if column < columns else 0

            loads = range(0, size * 8 // bits, 4 if bits == 8 else 8)
            for first in loads:
                if bits == 8:
                    found += [code(n, first + j) for n in range(16) for j in range(4)]
                    continue
                if bits > 4 and first % (32 // (bits - 4)) == 0:
                    for n in range(16):
                        for j in range(4):
                            above = [code(n, first + 4 * part + j) >> 4 for part in range(8 // (bits - 4))]
                            found.append(sum(value << (bits - 4) * part for part, value in enumerate(above)))
                low = [(code(n, first + j) & 15, code(n, first + 4 + j) & 15) for n in range(16) for j in range(4)]
                found += [one | other << 4 for one, other in low]
    return found
