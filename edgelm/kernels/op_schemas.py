"""The operators as onnxruntime is told of them: inputs, outputs, attributes."""

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
"""Places of what a node may do without."""

_SCALE_BYTES: Final = 2
_FLOAT_BYTES: Final = 4

FLOAT, UINT8, INT32, INT64 = 1, 2, 6, 7
"""Values of ONNXTensorElementDataType."""


@dataclass(frozen=True, slots=True)
class OpSchema:
    """An operator: the function that computes it, types of inputs and outputs, attributes, which go into its state.

    `optional` are inputs that may be absent; `places` are attributes that are places in the file of matrices.
    """

    name: str
    symbol: str
    inputs: tuple[int, ...]
    optional: frozenset[int]
    outputs: tuple[int, ...]
    value_attributes: tuple[StateField, ...]
    offset_attributes: tuple[StateField, ...] = ()
    fmt: WeightFormat | None = None
    """Of the matrix, for products and tables."""

    def bytes_at(self, attributes: Mapping[StateField, int]) -> dict[StateField, int]:
        """Return how many bytes are read at each place. Raises `ValueError` for attributes that no node may have."""
        if self.fmt is None:
            _check_heads(attributes)
            return {}
        size, columns = attributes[StateField.K], attributes[StateField.N]
        if not (1 <= size <= MAX_MATRIX_DIM and 1 <= columns <= MAX_MATRIX_DIM):
            raise ValueError(f"a matrix of {columns} x {size}")
        blocks = -(-size // self.fmt.block_size)
        panels = -(-columns // PANEL_COLUMNS)
        cells = panels * PANEL_COLUMNS * blocks
        bytes_at = {
            StateField.WEIGHTS: cells * self.fmt.block_bytes,
            StateField.SCALES: cells * _SCALE_BYTES,
            StateField.BIAS: panels * PANEL_COLUMNS * _FLOAT_BYTES,
            StateField.NORM: blocks * self.fmt.block_size * _FLOAT_BYTES,
        }
        return {place: bytes_at[place] for place in self.offset_attributes}


def _check_heads(attributes: Mapping[StateField, int]) -> None:
    """Raise `ValueError` for heads that the kernels of attention do not take."""
    heads, kv_heads, half = attributes[StateField.HEADS], attributes[StateField.KV_HEADS], attributes[StateField.HALF]
    if not (1 <= kv_heads <= heads <= MAX_MATRIX_DIM) or heads % kv_heads or heads // kv_heads > MAX_QUERY_TILE:
        raise ValueError(f"{heads} heads of queries, {kv_heads} of keys")
    if not 0 <= half <= MAX_KERNEL_HEAD_SIZE // 2 or attributes[StateField.WINDOW] < 0:
        raise ValueError(f"{half} rotated pairs, a window of {attributes[StateField.WINDOW]}")


def matmul_schema(fmt: WeightFormat) -> OpSchema:
    """Return the operator for matrices of a format (see `entry_points`)."""
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
    """Return the operator for tables of a format (see `looking_up`)."""
    places = (StateField.WEIGHTS, StateField.SCALES)
    sizes = (StateField.K, StateField.N)
    return OpSchema(fmt.gather_op_type, fmt.gather_symbol, (INT64,), frozenset(), (FLOAT,), sizes, places, fmt)


ATTENTION_SCHEMA: Final = OpSchema(
    ATTENTION,
    ATTENTION_SYMBOL,
    (FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, INT32, FLOAT, FLOAT, INT64),
    frozenset({1, 2, 6, 7, 8}),
    (FLOAT, FLOAT, FLOAT, FLOAT),
    (StateField.HEADS, StateField.KV_HEADS, StateField.HALF, StateField.WINDOW, StateField.SCALE, StateField.SOFTCAP),
)
"""Attention (see `attention`)."""
