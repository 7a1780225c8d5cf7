"""The operators as onnxruntime is told of them: inputs, outputs, attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edgelm.graph.domain import MOST_SIZE
from edgelm.kernels.abi import ATTENTION, ATTENTION_COMPUTE, COLUMNS, MOST_HEAD_SIZE, MOST_QUERIES, Format, State

OPTIONAL_PLACES: Final = frozenset({State.BIAS, State.NORM})
"""Places of what a node may do without."""

_SCALE_BYTES: Final = 2
_FLOAT_BYTES: Final = 4

FLOAT, UINT8, INT32, INT64 = 1, 2, 6, 7
"""Values of ONNXTensorElementDataType."""


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator: the function that computes it, types of inputs and outputs, attributes, which go into its state.

    `optional` are inputs that may be absent; `places` are attributes that are places in the file of matrices.
    """

    name: str
    compute: str
    inputs: tuple[int, ...]
    optional: frozenset[int]
    outputs: tuple[int, ...]
    numbers: tuple[State, ...]
    places: tuple[State, ...] = ()
    form: Format | None = None
    """Of the matrix, for products and tables."""

    def bytes_at(self, attributes: Mapping[State, int]) -> dict[State, int]:
        """Return how many bytes are read at each place. Raises `ValueError` for attributes that no node may have."""
        if self.form is None:
            _check_heads(attributes)
            return {}
        size, columns = attributes[State.K], attributes[State.N]
        if not (1 <= size <= MOST_SIZE and 1 <= columns <= MOST_SIZE):
            raise ValueError(f"a matrix of {columns} x {size}")
        blocks = -(-size // self.form.block)
        panels = -(-columns // COLUMNS)
        cells = panels * COLUMNS * blocks
        bytes_at = {
            State.WEIGHTS: cells * self.form.block_bytes,
            State.SCALES: cells * _SCALE_BYTES,
            State.BIAS: panels * COLUMNS * _FLOAT_BYTES,
            State.NORM: blocks * self.form.block * _FLOAT_BYTES,
        }
        return {place: bytes_at[place] for place in self.places}


def _check_heads(attributes: Mapping[State, int]) -> None:
    """Raise `ValueError` for heads that the kernels of attention do not take."""
    heads, kv_heads, half = attributes[State.HEADS], attributes[State.KV_HEADS], attributes[State.HALF]
    if not (1 <= kv_heads <= heads <= MOST_SIZE) or heads % kv_heads or heads // kv_heads > MOST_QUERIES:
        raise ValueError(f"{heads} heads of queries, {kv_heads} of keys")
    if not 0 <= half <= MOST_HEAD_SIZE // 2 or attributes[State.WINDOW] < 0:
        raise ValueError(f"{half} rotated pairs, a window of {attributes[State.WINDOW]}")


def product_of(form: Format) -> Operator:
    """Return the operator for matrices of a format (see `entry_points`)."""
    return Operator(
        form.operator,
        form.compute,
        (FLOAT, FLOAT),
        frozenset({1}),
        (FLOAT, UINT8),
        (State.K, State.N, State.GATED, State.EPSILON),
        (State.WEIGHTS, State.SCALES, State.BIAS, State.NORM),
        form,
    )


def look_up_of(form: Format) -> Operator:
    """Return the operator for tables of a format (see `looking_up`)."""
    places = (State.WEIGHTS, State.SCALES)
    sizes = (State.K, State.N)
    return Operator(form.look_up_operator, form.look_up, (INT64,), frozenset(), (FLOAT,), sizes, places, form)


ATTENDING: Final = Operator(
    ATTENTION,
    ATTENTION_COMPUTE,
    (FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, INT32, FLOAT, FLOAT, INT64),
    frozenset({1, 2, 6, 7, 8}),
    (FLOAT, FLOAT, FLOAT, FLOAT),
    (State.HEADS, State.KV_HEADS, State.HALF, State.WINDOW, State.SCALE, State.SOFTCAP),
)
"""Attention (see `attention`)."""
