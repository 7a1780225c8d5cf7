"""The packed layout of quantized matrices.

For 4 and 8 bits it is the layout of onnxruntime's MatMulNBits and GatherBlockQuantized (ContribOperators.md). For 5 and
6 bits the low 4 bits are stored like 4-bit codes, and the bits above in a second array; `graph.matrices` adds nodes
that join both to 8-bit codes when onnxruntime loads the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A quantized matrix [N, K] with codes of 4, 5, 6 or 8 bits.

    data: uint8 [N, blocks, block_size * bits / 8], two 4-bit codes per byte, the first in the low half; for 5 and 6
    bits only the low 4 bits of the codes. high_bits: for 5 and 6 bits uint8 [N, blocks, block_size * (bits - 4) / 8],
    the rest of each code, the first code in the lowest bits of a byte; otherwise None. scales: float16 or float32 [N,
    blocks], never zero; float16 scales must be cast to float32 for the operators. zero_points: uint8 [N, ceil(blocks *
    bits / 8)], packed like codes, the last half byte 0 if the number of blocks is odd; None means 2^(bits-1), the
    operators' default for unsigned codes; always None for 5 and 6 bits. Codes past column K are the zero point.
    """

    data: NDArray[np.uint8]
    scales: NDArray[np.float16] | NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    bits: int
    block_size: int
    columns: int
    high_bits: NDArray[np.uint8] | None = None

    def rows(self, start: int, stop: int) -> PackedMatrix:
        """Return rows [start, stop) as a matrix."""
        points = None if self.zero_points is None else self.zero_points[start:stop]
        high = None if self.high_bits is None else self.high_bits[start:stop]
        return replace(
            self, data=self.data[start:stop], scales=self.scales[start:stop], zero_points=points, high_bits=high
        )

    @classmethod
    def join_rows(cls, parts: Sequence[PackedMatrix]) -> PackedMatrix:
        """Concatenate the rows of matrices with the same layout."""
        points = [part.zero_points for part in parts if part.zero_points is not None]
        high = [part.high_bits for part in parts if part.high_bits is not None]
        return replace(
            parts[0],
            data=np.concatenate([part.data for part in parts]),
            scales=np.concatenate([part.scales for part in parts]),
            zero_points=np.concatenate(points) if points else None,
            high_bits=np.concatenate(high) if high else None,
        )


def pack_codes(
    codes: NDArray[np.uint8], scales: NDArray[Any], zeros: NDArray[Any] | None, bits: int, columns: int
) -> PackedMatrix:
    """Pack codes uint8 [N, blocks * block_size] with scales and zero points [N, blocks]."""
    rows, blocks = scales.shape
    block_size = codes.shape[1] // blocks
    if bits in (5, 6):
        low, high = _pack_nibbles(codes & np.uint8(15), 4), _pack_bits(codes >> np.uint8(4), bits - 4)
        shape = rows, blocks, -1
        return PackedMatrix(low.reshape(shape), scales, None, bits, block_size, columns, high.reshape(shape))
    points = None if zeros is None else _pack_nibbles(zeros.astype(np.uint8), bits)
    return PackedMatrix(_pack_nibbles(codes, bits).reshape(rows, blocks, -1), scales, points, bits, block_size, columns)


def unpack_codes(packed: PackedMatrix) -> NDArray[np.uint8]:
    """Return uint8 [N, blocks, block_size]."""
    rows, blocks, _ = packed.data.shape
    shape = rows, blocks, packed.block_size
    if packed.high_bits is None:
        return _unpack_nibbles(packed.data.reshape(rows, -1), packed.bits).reshape(shape)
    low = _unpack_nibbles(packed.data.reshape(rows, -1), 4).reshape(shape)
    return low | _unpack_bits(packed.high_bits.reshape(rows, -1), packed.bits - 4).reshape(shape) << np.uint8(4)


def unpack_zero_points(packed: PackedMatrix) -> NDArray[np.uint8]:
    """Return the zero points, stored or not, as uint8 [N, blocks]."""
    if packed.zero_points is None:
        return np.full(packed.scales.shape, 1 << (packed.bits - 1), np.uint8)
    return _unpack_nibbles(packed.zero_points, packed.bits)[:, : packed.scales.shape[1]]


def dequantize(packed: PackedMatrix) -> NDArray[np.float32]:
    """Return the float32 [N, K] that the operators compute with."""
    centred = unpack_codes(packed).astype(np.float32) - unpack_zero_points(packed)[:, :, None]
    values = centred * packed.scales.astype(np.float32)[:, :, None]
    return values.reshape(len(values), -1)[:, : packed.columns]


def _pack_nibbles(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[N, n] -> two 4-bit values per byte, the first in the low half; 8-bit values unchanged."""
    if bits == 8:
        return values
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    return np.ascontiguousarray(values[:, 0::2] | (values[:, 1::2] << 4))


def _unpack_nibbles(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    return values if bits == 8 else np.stack([values & 0xF, values >> 4], axis=-1).reshape(len(values), -1)


def _pack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[N, n] values of 1 or 2 bits -> as many per byte as fit, the first in the lowest bits."""
    parts = values.reshape(len(values), -1, 8 // bits)
    joined = np.zeros(parts.shape[:2], np.uint8)
    for i in range(8 // bits):
        joined |= parts[:, :, i] << (i * bits)
    return joined


def _unpack_bits(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Invert `_pack_bits`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts: NDArray[np.uint8] = (values[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
    return parts.reshape(len(values), -1)
