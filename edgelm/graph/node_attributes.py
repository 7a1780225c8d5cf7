"""Changing a whole-number attribute of a model's nodes in the bytes of the model, an ONNX ModelProto."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from edgelm.graph.protobuf import LENGTH_DELIMITED, VARINT, Field, encode_message, parse_fields

_PATH: Final = (7, 1, 5)
"""Field numbers that lead to an attribute: ModelProto.graph, GraphProto.node, NodeProto.attribute."""
_NAME, _INTEGER = 1, 3
"""Field numbers of AttributeProto.name and AttributeProto.i."""


def change_attribute(model: bytes, name: str, change: Callable[[int], int]) -> bytes:
    """Return a model with every attribute of a name changed. Raises `ValueError` for what is no model."""
    try:
        return _changed(model, _PATH, name.encode(), change)
    except ValueError as error:
        raise ValueError(f"not an ONNX model: {error}") from error


def _changed(data: bytes, path: tuple[int, ...], name: bytes, change: Callable[[int], int]) -> bytes:
    """Copy a message, changed inside the fields of `path`; at its end the message is an attribute."""
    parts: list[Field] = list(parse_fields(data))
    if name not in data:
        return data  # as it is: a number may be written in more bytes than it needs
    if path:
        return encode_message(
            (number, wire_type, _changed(value, path[1:], name, change))
            if number == path[0] and wire_type == LENGTH_DELIMITED and isinstance(value, bytes)
            else (number, wire_type, value)
            for number, wire_type, value in parts
        )
    if (_NAME, LENGTH_DELIMITED, name) not in parts:
        return data
    return encode_message(
        (
            number,
            wire_type,
            change(value) if number == _INTEGER and wire_type == VARINT and isinstance(value, int) else value,
        )
        for number, wire_type, value in parts
    )
