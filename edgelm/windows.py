"""Sliding windows on old runtimes: the same graph, whatever onnxruntime means by `local_window_size`.

Bundles say how many positions a query sees, its own included, as onnxruntime does from 1.24 on. Before (its pull
request 25927, "Fix Local Attention off by 1 bug") one more was seen. The attribute is changed in the bytes of the
model, an ONNX ModelProto.
"""

from __future__ import annotations

from typing import Final

from edgelm.protobuf import BYTES, VARINT, Field, fields, message

ATTRIBUTE: Final = b"local_window_size"
PATH: Final = (7, 1, 5)
"""Field numbers that lead to an attribute: ModelProto.graph, GraphProto.node, NodeProto.attribute."""
NAME, INTEGER = 1, 3
"""Field numbers of AttributeProto.name and AttributeProto.i."""


def has_windows(model: bytes) -> bool:
    """Tell whether a model may have a sliding window."""
    return ATTRIBUTE in model


def with_old_windows(model: bytes) -> bytes:
    """Return the model with every window one position smaller. Raises `ValueError` for what is no model."""
    try:
        return _changed(model, PATH)
    except ValueError as error:
        raise ValueError(f"not an ONNX model: {error}") from error


def _changed(data: bytes, path: tuple[int, ...]) -> bytes:
    """Copy a message, changed inside the fields of `path`; at its end the message is an attribute."""
    parts: list[Field] = list(fields(data))
    if ATTRIBUTE not in data:
        return data  # as it is: a number may be written in more bytes than it needs
    if path:
        return message(
            (number, kind, _changed(value, path[1:]))
            if number == path[0] and kind == BYTES and isinstance(value, bytes)
            else (number, kind, value)
            for number, kind, value in parts
        )
    if (NAME, BYTES, ATTRIBUTE) not in parts:
        return data
    return message(
        (number, kind, value - 1 if number == INTEGER and kind == VARINT and isinstance(value, int) else value)
        for number, kind, value in parts
    )
