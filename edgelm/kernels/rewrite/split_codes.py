"""Finds codes of 5 and 6 bits in a graph, which nodes on constants expand to the 8-bit codes that onnxruntime reads.

A code is stored as its low 4 bits and the bits above. The nodes replace its zero point 2^(bits-1) by 128. Only exactly
these nodes match; codes that are computed in any other way are left to onnxruntime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.graph.onnx_model import INT64, UINT8, Node, Tensor, is_ort_operator

LOW: Final = "low"
HIGH: Final = "high"

Pattern = str | list[int] | tuple[Any, ...]
"""LOW or HIGH for a stored tensor; the values of a constant; or an operator, its direction, patterns of its inputs."""


def _shift(direction: bytes, value: Pattern, by: list[int]) -> Pattern:
    return ("BitShift", direction, value, by)


def _unpacked(source: str, bits: int, shape: list[int]) -> Pattern:
    """Return the pattern that splits every byte into values of `bits` bits, lowest first."""
    bytes_ = ("Unsqueeze", b"", source, [-1])
    masked = ("BitwiseAnd", b"", _shift(b"RIGHT", bytes_, list(range(0, 8, bits))), [(1 << bits) - 1])
    return ("Reshape", b"", masked, shape)


def _expanded(bits: int, shape: list[int]) -> Pattern:
    """Return the pattern of 8-bit codes [N, blocks, block_size]: the highest bit is repeated upwards, then flipped."""
    moved = _shift(b"LEFT", _unpacked(HIGH, bits - 4, shape), [4])
    codes: Pattern = ("BitwiseOr", b"", _unpacked(LOW, 4, shape), moved)
    top = moved if bits == 5 else ("BitwiseAnd", b"", moved, [0x20])
    for by in range(1, 9 - bits):
        codes = ("BitwiseOr", b"", codes, _shift(b"LEFT", top, [by]))
    return ("BitwiseXor", b"", codes, [0x70 if bits == 5 else 0x60])


class SplitCodeMatcher:
    """Finds the stored parts of split codes. `array` returns a tensor's values."""

    def __init__(
        self, tensors: Mapping[str, Tensor], producers: Mapping[str, Node], array: Callable[[Tensor], NDArray[Any]]
    ) -> None:
        self._tensors = tensors
        self._producers = producers
        self._array = array

    def match_parts(self, name: str, shape: Sequence[int]) -> tuple[int, Tensor, Tensor] | None:
        """Return bits, tensor of low 4 bits and tensor of high bits of codes [N, blocks, block_size]; None if no match.

        shape: the shape of the codes.
        """
        for bits in (5, 6):
            found: dict[str, str] = {}
            if self._matches(name, _expanded(bits, list(shape)), found):
                parts = self._tensors[found[LOW]], self._tensors[found[HIGH]]
                if [part.dtype for part in parts] == [UINT8, UINT8] and [
                    8 * int(np.prod(part.shape, dtype=np.int64)) for part in parts
                ] == [int(np.prod(shape)) * width for width in (4, bits - 4)]:
                    return bits, *parts
        return None

    def constant(self, name: str) -> list[int] | None:
        """Return the values of a one-dimensional integer tensor of at most 8 values; None for other tensors."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dtype not in (UINT8, INT64) or len(tensor.shape) != 1 or tensor.shape[0] > 8:
            return None
        return [int(value) for value in self._array(tensor)]

    def _matches(self, name: str, pattern: Pattern, found: dict[str, str]) -> bool:
        """Return whether a pattern computes a value; store the names of its tensors in `found`, by LOW and HIGH."""
        if isinstance(pattern, str):
            return name in self._tensors and found.setdefault(pattern, name) == name
        if isinstance(pattern, list):
            return self.constant(name) == pattern
        operator, direction, *inputs = pattern
        node = self._producers.get(name)
        return (
            node is not None
            and is_ort_operator(node, operator)
            and node.string_attributes == ({"direction": direction} if direction else {})
            and not node.attributes
            and len(node.inputs) == len(inputs)
            and all(self._matches(*pair, found) for pair in zip(node.inputs, inputs, strict=True))
        )
