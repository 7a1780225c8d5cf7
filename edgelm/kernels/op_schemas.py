"""The operator schemas that onnxruntime needs: types of inputs and outputs, attributes, ranges of the attributes.

Knows nothing of how onnxruntime is called (see `custom_ops`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edgelm.graph.domain import MAX_MATRIX_DIM
from edgelm.kernels.abi import (
    ATTENTION,
    ATTENTION_SYMBOL,
    MAX_KERNEL_HEAD_SIZE,
    MAX_QUERY_TILE,
    PANEL_COLUMNS,
    StateField,
    WeightFormat,
)

OPTIONAL_OFFSETS: Final = frozenset({StateField.BIAS, StateField.NORM})
"""Offset attributes that may be `NO_OFFSET`."""

_SCALE_BYTES: Final = 2
_FLOAT_BYTES: Final = 4

FLOAT, UINT8, INT32, INT64 = 1, 2, 6, 7
"""Values of ONNXTensorElementDataType."""


@dataclass(frozen=True, slots=True)
class OpSchema:
    """An operator: its name, the symbol that computes it, element types of inputs and outputs, and its attributes.

    `optional` are the indices of inputs that may be absent. Attributes are integers, which become fields of the node's
    state: `value_attributes` as they are, `offset_attributes`, offsets in the data file, as addresses.
    """

    name: str
    symbol: str
    inputs: tuple[int, ...]
    optional: frozenset[int]
    outputs: tuple[int, ...]
    value_attributes: tuple[StateField, ...]
    offset_attributes: tuple[StateField, ...] = ()
    fmt: WeightFormat | None = None
    """Format of the matrix; None for attention."""

    def bytes_at(self, attributes: Mapping[StateField, int]) -> dict[StateField, int]:
        """Return the number of bytes read at each offset. Raises `ValueError` if an attribute is out of range."""
        if self.fmt is None:
            _check_heads(attributes)
            return {}
        size, columns = attributes[StateField.K], attributes[StateField.N]
        if not (1 <= size <= MAX_MATRIX_DIM and 1 <= columns <= MAX_MATRIX_DIM):
            raise ValueError(f"N {columns} and K {size} must lie in [1, {MAX_MATRIX_DIM}]")
        blocks = -(-size // self.fmt.block_size)
        panels = -(-columns // PANEL_COLUMNS)
        cells = panels * PANEL_COLUMNS * blocks
        bytes_at = {
            StateField.WEIGHTS: cells * self.fmt.block_bytes,
            StateField.SCALES: cells * _SCALE_BYTES,
            StateField.BIAS: panels * PANEL_COLUMNS * _FLOAT_BYTES,
            StateField.NORM: blocks * self.fmt.block_size * _FLOAT_BYTES,
        }
        return {field: bytes_at[field] for field in self.offset_attributes}


def _check_heads(attributes: Mapping[StateField, int]) -> None:
    """Raise `ValueError` if the attention kernels do not support the attributes."""
    heads, kv_heads, half = attributes[StateField.HEADS], attributes[StateField.KV_HEADS], attributes[StateField.HALF]
    if not (1 <= kv_heads <= heads <= MAX_MATRIX_DIM) or heads % kv_heads or heads // kv_heads > MAX_QUERY_TILE:
        raise ValueError(f"{heads} query heads and {kv_heads} KV heads are not supported")
    if not 0 <= half <= MAX_KERNEL_HEAD_SIZE // 2 or attributes[StateField.WINDOW] < 0:
        raise ValueError(f"{half} rotated pairs and a window of {attributes[StateField.WINDOW]} are not supported")


def matmul_schema(fmt: WeightFormat) -> OpSchema:
    """Return the schema of the MatMul operator of a format (see `ir.matmul_operator`)."""
    return OpSchema(
        fmt.matmul_op_type,
        fmt.matmul_symbol,
        (FLOAT, FLOAT),
        frozenset({1}),
        (FLOAT, UINT8),
        (StateField.K, StateField.N, StateField.GATED, StateField.EPSILON),
        (StateField.WEIGHTS, StateField.SCALES, StateField.BIAS, StateField.NORM),
        fmt,
    )


def gather_schema(fmt: WeightFormat) -> OpSchema:
    """Return the schema of the Gather operator of a format (see `ir.gather_operator`)."""
    offsets = (StateField.WEIGHTS, StateField.SCALES)
    sizes = (StateField.K, StateField.N)
    return OpSchema(fmt.gather_op_type, fmt.gather_symbol, (INT64,), frozenset(), (FLOAT,), sizes, offsets, fmt)


ATTENTION_SCHEMA: Final = OpSchema(
    ATTENTION,
    ATTENTION_SYMBOL,
    (FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, INT32, FLOAT, FLOAT, INT64),
    frozenset({1, 2, 6, 7, 8}),
    (FLOAT, FLOAT, FLOAT, FLOAT),
    (StateField.HEADS, StateField.KV_HEADS, StateField.HALF, StateField.WINDOW, StateField.SCALE, StateField.SOFTCAP),
)
"""Schema of the attention operator (see `ir.attention_operator`)."""
