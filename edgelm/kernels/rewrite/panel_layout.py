"""The panel layout: 16 columns of a matrix interleaved, so that a kernel reads one stream and sums a column per lane.

MatMulNBits stores a matrix as codes, uint8 [N, blocks, block_size * bits / 8], low nibbles first, and scales,
[N, blocks]. Panel p holds columns 16p .. 16p + 15: for each block, 64 bytes for every 8 (4 bits) or 4 (8 bits) weights
of a column. Byte 4n + j of the 64 belongs to column n: it holds weight j and, with 4 bits, weight 4 + j in its high
half.

With 5 and 6 bits the low 4 bits are stored in the same way. In front of each 256 (5 bits) or 128 (6 bits) bytes of them
lie 64 bytes with the high bits: byte 4n + j holds those of weights j, 4 + j, 8 + j and so on of column n, the first in
its lowest bits. In the original matrix the high bits are uint8 [N, blocks, block_size * (bits - 4) / 8], the first
weight in the lowest bits of a byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.kernels.abi import PANEL_COLUMNS


def pack_codes(codes: NDArray[np.uint8], bits: int, high: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Return codes in panels: uint8 [N, blocks, bytes] -> uint8 [ceil(N / 16), blocks, 2 * block_size * bits].

    With 5 and 6 bits `codes` are the low 4 bits of each weight and `high` the bits above.
    """
    codes = _pad_columns(codes)
    columns, blocks, size = codes.shape
    panels = columns // PANEL_COLUMNS
    if bits == 8:
        fours = codes.reshape(panels, PANEL_COLUMNS, blocks, size // 4, 4)  # panel, column, block, four, weight
        return np.ascontiguousarray(fours.transpose(0, 2, 3, 1, 4)).reshape(panels, blocks, PANEL_COLUMNS * size)
    pairs = codes.reshape(panels, PANEL_COLUMNS, blocks, size // 4, 2, 2)  # panel, column, block, eight, half, byte
    pairs = np.ascontiguousarray(pairs.transpose(4, 0, 2, 3, 1, 5))  # half, panel, block, eight, column, byte
    first, second = pairs & 15, pairs >> 4
    packed = np.empty((*pairs.shape[1:], 2), np.uint8)  # weights 0 and 1 of a byte
    packed[..., 0] = first[0] | first[1] << 4
    packed[..., 1] = second[0] | second[1] << 4
    if high is None:
        return packed.reshape(panels, blocks, PANEL_COLUMNS * size)
    planes = _pack_high(_pad_columns(high), bits - 4)
    groups = planes.shape[2]
    whole = np.concatenate([planes, packed.reshape(panels, blocks, groups, -1)], axis=-1)
    return whole.reshape(panels, blocks, -1)


def _pack_high(high: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return the high bits in panels: uint8 [columns, blocks, bytes] -> uint8 [panels, blocks, groups, 64]."""
    columns, blocks, size = high.shape
    unpacked = np.unpackbits(high, axis=-1, bitorder="little")
    parts = 8 // bits  # a vector of 64 bytes holds the bits of this many parts of four weights a column
    # panel, column, block, group, part, weight, bit -> panel, block, group, column, weight, part and bit
    unpacked = unpacked.reshape(columns // PANEL_COLUMNS, PANEL_COLUMNS, blocks, size // 4, parts, 4, bits).transpose(
        0, 2, 3, 1, 5, 4, 6
    )
    packed = np.packbits(unpacked.reshape(*unpacked.shape[:5], 8), axis=-1, bitorder="little")
    return packed.reshape(columns // PANEL_COLUMNS, blocks, size // 4, 4 * PANEL_COLUMNS)


def _pad_columns(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return codes padded to whole panels: [N, blocks, bytes] -> [16 * ceil(N / 16), blocks, bytes]."""
    missing = -len(codes) % PANEL_COLUMNS
    return np.concatenate([codes, np.zeros((missing, *codes.shape[1:]), np.uint8)]) if missing else codes


def pack_scales(scales: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """Return scales in panels: [N, blocks] -> float16 [ceil(N / 16), blocks, 16]."""
    columns, blocks = scales.shape
    padded = np.zeros((-(-columns // PANEL_COLUMNS) * PANEL_COLUMNS, blocks), np.float16)
    padded[:columns] = scales
    return np.ascontiguousarray(padded.reshape(-1, PANEL_COLUMNS, blocks).transpose(0, 2, 1))


def pad_bias(bias: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a bias padded to whole panels: [N] -> float32 [16 * ceil(N / 16)]."""
    return np.concatenate([bias, np.zeros(-len(bias) % PANEL_COLUMNS, np.float32)])
