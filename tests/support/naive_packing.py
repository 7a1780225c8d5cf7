"""Quantized checkpoints written by plain loops from known codes, one code at a time.

The layouts are those of the projects that publish such checkpoints: AutoGPTQ 0.7 (`qlinear_cuda_old.py`, `pack`) and
GPTQModel (`gptq_v2`), AutoAWQ 0.2 (`awq/modules/linear/gemm.py`, `from_linear`), and transformers 4.57
(`integrations/finegrained_fp8.py`, `fbgemm_fp8.py`). Every function takes and returns numpy arrays.
"""

from __future__ import annotations

import numpy as np

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""`order_map` of AutoAWQ: column `order_map[i]` of each eight goes into bits 4 i to 4 i + 3."""


def signed(word):
    return np.uint32(word & 0xFFFFFFFF).view(np.int32)


def pack_gptq(codes, zeros, scales, bits, group_of, *, v2=False):
    """codes [N, K], zeros and scales [groups, N] -> the tensors of a linear layer, less `.weight`."""
    outputs, inputs = codes.shape
    groups, each = len(zeros), 32 // bits
    qweight = np.zeros((inputs // each, outputs), np.int32)
    for word in range(inputs // each):
        for n in range(outputs):
            value = 0
            for i in range(each):
                value |= int(codes[n, word * each + i]) << (bits * i)
            qweight[word, n] = signed(value)
    qzeros = np.zeros((groups, outputs // each), np.int32)
    for g in range(groups):
        for word in range(outputs // each):
            value = 0
            for i in range(each):
                stored = (int(zeros[g, word * each + i]) - (0 if v2 else 1)) & (2**bits - 1)
                value |= stored << (bits * i)
            qzeros[g, word] = signed(value)
    return {
        "qweight": qweight,
        "qzeros": qzeros,
        "scales": scales.astype(np.float16),
        "g_idx": np.array(group_of, np.int32),
    }


def pack_awq(codes, zeros, scales):
    """codes [N, K] of 4 bits, zeros and scales [groups, N] -> the tensors of a linear layer, less `.weight`."""
    outputs, inputs = codes.shape

    def words(rows):  # [rows, N] -> [rows, N / 8]
        packed = np.zeros((len(rows), outputs // 8), np.int32)
        for r in range(len(rows)):
            for word in range(outputs // 8):
                value = 0
                for i in range(8):
                    value |= int(rows[r][word * 8 + AWQ_ORDER[i]]) << (4 * i)
                packed[r, word] = signed(value)
        return packed

    by_input = [[codes[n, k] for n in range(outputs)] for k in range(inputs)]
    return {"qweight": words(by_input), "qzeros": words(zeros), "scales": scales.astype(np.float16)}


def unpacked(codes, zeros, scales, group_of):
    """The dequantized matrix [N, K]: scale * (code - zero) with the group of each weight."""
    outputs, inputs = codes.shape
    weight = np.zeros((outputs, inputs), np.float32)
    for n in range(outputs):
        for k in range(inputs):
            g = group_of[k]
            weight[n, k] = np.float32(np.float16(scales[g, n])) * (int(codes[n, k]) - int(zeros[g, n]))
    return weight


def float8_value(byte):
    """The value of a byte in E4M3 (arXiv:2209.05433, table 1): sign, 4 bits of exponent with bias 7, 3 of fraction."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, fraction = (byte >> 3) & 0xF, byte & 0x7
    if exponent == 0xF and fraction == 0x7:
        return float("nan")
    if exponent == 0:
        return sign * fraction / 8 * 2.0**-6
    return sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def scaled_bytes(codes, scales, block):
    """The dequantized matrix, with a scale for each block of [block rows, block columns]."""
    rows, columns = codes.shape
    weight = np.zeros((rows, columns), np.float32)
    for n in range(rows):
        for k in range(columns):
            weight[n, k] = np.float32(float8_value(int(codes[n, k]))) * scales[n // block[0], k // block[1]]
    return weight
