"""Matrices in panels: 16 columns side by side, so that a kernel reads one stream and sums columns in lanes.

A matrix as MatMulNBits stores it has `codes` uint8 [N, blocks, block * bits / 8], low nibbles first, and scales
[N, blocks]. A panel holds columns 16p .. 16p + 15 of it: for each block, 64 bytes for every 8 (4 bits) or 4 (8 bits)
weights of a column. Byte 4n + j of the 64 belongs to column n: weight j, and in its high half weight 4 + j.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.native.formats import COLUMNS


def packed_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return codes in panels: uint8 [N, blocks, bytes] -> uint8 [ceil(N / 16), blocks, 16 * bytes]."""
    columns, blocks, size = codes.shape
    short = -columns % COLUMNS
    if short:
        codes = np.concatenate([codes, np.zeros((short, blocks, size), np.uint8)])
    panels = len(codes) // COLUMNS
    if bits == 8:
        fours = codes.reshape(panels, COLUMNS, blocks, size // 4, 4)  # panel, column, block, four, weight
        return np.ascontiguousarray(fours.transpose(0, 2, 3, 1, 4)).reshape(panels, blocks, COLUMNS * size)
    pairs = codes.reshape(panels, COLUMNS, blocks, size // 4, 2, 2)  # panel, column, block, eight, half, byte
    pairs = np.ascontiguousarray(pairs.transpose(4, 0, 2, 3, 1, 5))  # half, panel, block, eight, column, byte
    low, high = pairs & 15, pairs >> 4
    packed = np.empty((*pairs.shape[1:], 2), np.uint8)  # weights 0 and 1 of a byte
    packed[..., 0] = low[0] | low[1] << 4
    packed[..., 1] = high[0] | high[1] << 4
    return packed.reshape(panels, blocks, COLUMNS * size)


def packed_scales(scales: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """Return scales in panels: [N, blocks] -> float16 [ceil(N / 16), blocks, 16]."""
    columns, blocks = scales.shape
    padded = np.zeros((-(-columns // COLUMNS) * COLUMNS, blocks), np.float16)
    padded[:columns] = scales
    return np.ascontiguousarray(padded.reshape(-1, COLUMNS, blocks).transpose(0, 2, 1))


def packed_bias(bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a bias of as many columns as the panels have: [N] -> float32 [16 * ceil(N / 16)]."""
    return np.concatenate([bias, np.zeros(-len(bias) % COLUMNS, np.float32)])
