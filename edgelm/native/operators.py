"""The operators as onnxruntime is told of them: inputs, outputs, attributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgelm.native.formats import ATTENTION, ATTENTION_COMPUTE, Format, State

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
    )


def look_up_of(form: Format) -> Operator:
    """Return the operator for tables of a format (see `looking_up`)."""
    places = (State.WEIGHTS, State.SCALES)
    return Operator(form.look_up_operator, form.look_up, (INT64,), frozenset(), (FLOAT,), (State.K, State.N), places)


ATTENDING: Final = Operator(
    ATTENTION,
    ATTENTION_COMPUTE,
    (FLOAT, FLOAT, FLOAT, FLOAT, FLOAT, INT32, FLOAT, FLOAT, INT64),
    frozenset({1, 2, 6, 7, 8}),
    (FLOAT, FLOAT, FLOAT, FLOAT),
    (State.HEADS, State.KV_HEADS, State.HALF, State.WINDOW, State.SCALE, State.SOFTCAP),
)
"""Attention (see `attention`)."""
