"""The packed layout that onnxruntime's MatMulNBits and GatherBlockQuantized read (ContribOperators.md)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from .rounding import CANDIDATES, round_blocks

Method = Literal["rtn", "clip"]
METHODS: Final[tuple[Method, ...]] = ("rtn", "clip")


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized matrix [N, K].

    data: uint8 [N, blocks, block_size * bits / 8], two 4-bit codes a byte, the first in the low half.
    scales: float32 [N, blocks]. The zero point is 2^(bits-1), the operators' default for unsigned codes.
    """

    data: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int
    block_size: int
    columns: int


def quantize(weight: NDArray[np.float32], bits: int, block_size: int, method: Method) -> Packed:
    """Quantize float32 [N, K] to 4 or 8 bits in blocks along K; the last block may be short."""
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    codes = np.empty((rows, blocks * block_size), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    candidates = CANDIDATES if method == "clip" else 0
    workers = os.cpu_count() or 1
    step = max(1, -(-rows // (4 * workers)))
    with ThreadPoolExecutor(workers) as pool:
        tasks = [
            pool.submit(
                round_blocks,
                weight[i : i + step],
                block_size,
                bits,
                candidates,
                codes[i : i + step],
                scales[i : i + step],
            )
            for i in range(0, rows, step)
        ]
        for task in tasks:
            task.result()
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return Packed(codes.reshape(rows, blocks, block_size * bits // 8), scales, bits, block_size, columns)


def dequantize(packed: Packed) -> NDArray[np.float32]:
    """Return the float32 [N, K] that the operators compute with."""
    rows, blocks, _ = packed.data.shape
    flat = packed.data.reshape(rows, -1)
    codes = np.stack([flat & 0xF, flat >> 4], axis=-1) if packed.bits == 4 else flat
    centred = codes.reshape(rows, blocks, packed.block_size).astype(np.float32) - (1 << (packed.bits - 1))
    values = centred * packed.scales[:, :, None]
    return values.reshape(rows, -1)[:, : packed.columns]
