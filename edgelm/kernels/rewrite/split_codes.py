"""Codes of 5 and 6 bits in a graph, which nodes of constants join to the 8-bit codes that onnxruntime reads.

A code is stored as its low 4 bits and the bits above; its distance from its zero point 2^(bits-1) becomes the same
distance from 128. Nodes are recognized only where they are exactly those that say so: whatever else computes codes is
onnxruntime's matter.
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
"""A stored tensor by what it is; the values of a constant; an operator, its direction and patterns of its inputs."""


def _shift(direction: bytes, value: Pattern, by: list[int]) -> Pattern:
    return ("BitShift", direction, value, by)


def _parts(source: str, bits: int, shape: list[int]) -> Pattern:
    """Every byte split into values of some bits, the lowest first."""
    apart = ("Unsqueeze", b"", source, [-1])
    masked = ("BitwiseAnd", b"", _shift(b"RIGHT", apart, list(range(0, 8, bits))), [(1 << bits) - 1])
    return ("Reshape", b"", masked, shape)


def _joined(bits: int, shape: list[int]) -> Pattern:
    """Codes of 8 bits [N, blocks, block]: those of 5 or 6 with the highest bit repeated upwards, and flipped."""
    moved = _shift(b"LEFT", _parts(HIGH, bits - 4, shape), [4])
    codes: Pattern = ("BitwiseOr", b"", _parts(LOW, 4, shape), moved)
    top = moved if bits == 5 else ("BitwiseAnd", b"", moved, [0x20])
    for by in range(1, 9 - bits):
        codes = ("BitwiseOr", b"", codes, _shift(b"LEFT", top, [by]))
    return ("BitwiseXor", b"", codes, [0x70 if bits == 5 else 0x60])


class SplitCodeMatcher:
    """Finds what codes are joined from. `array` gives a tensor's values."""

    def __init__(
        self, tensors: Mapping[str, Tensor], makers: Mapping[str, Node], array: Callable[[Tensor], NDArray[Any]]
    ) -> None:
        self._tensors = tensors
        self._producers = makers
        self._array = array

    def match_parts(self, name: str, shape: Sequence[int]) -> tuple[int, Tensor, Tensor] | None:
        """Return bits, low 4 bits and the bits above of codes of `shape` [N, blocks, block]; None for all others."""
        for bits in (5, 6):
            found: dict[str, str] = {}
            if self._fits(name, _joined(bits, list(shape)), found):
                parts = self._tensors[found[LOW]], self._tensors[found[HIGH]]
                if [part.dtype for part in parts] == [UINT8, UINT8] and [
                    8 * int(np.prod(part.shape, dtype=np.int64)) for part in parts
                ] == [int(np.prod(shape)) * width for width in (4, bits - 4)]:
                    return bits, *parts
        return None

    def constant(self, name: str) -> list[int] | None:
        """Return the values of a constant of integers of one dimension; None for what is none."""
        tensor = self._tensors.get(name)
        if tensor is None or tensor.dtype not in (UINT8, INT64) or len(tensor.shape) != 1 or tensor.shape[0] > 8:
            return None
        return [int(value) for value in self._array(tensor)]

    def _fits(self, name: str, pattern: Pattern, found: dict[str, str]) -> bool:
        """Whether a value is computed as a pattern says; put the names of stored tensors into `found`."""
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
            and all(self._fits(*pair, found) for pair in zip(node.inputs, inputs, strict=True))
        )
