"""Sliding windows on old runtimes: the same graph, whatever onnxruntime means by `local_window_size`.

Bundles say how many positions a query sees, its own included, as onnxruntime does from 1.24 on. Before (its pull
request 25927, "Fix Local Attention off by 1 bug") one more was seen. The attribute is changed in the bytes of the
model, an ONNX ModelProto, by walking protobuf's wire format (protobuf.dev/programming-guides/encoding): the runtime
does without the onnx package.
"""

from __future__ import annotations

from typing import Final

ATTRIBUTE: Final = b"local_window_size"
PATH: Final = (7, 1, 5)
"""Field numbers that lead to an attribute: ModelProto.graph, GraphProto.node, NodeProto.attribute."""
INTEGER: Final = 3
"""Field number of AttributeProto.i."""


def has_windows(model: bytes) -> bool:
    """Tell whether a model may have a sliding window."""
    return ATTRIBUTE in model


def with_old_windows(model: bytes) -> bytes:
    """Return the model with every window one position smaller. Raises `ValueError` for what is no model."""
    return _message(model, 0)


def _message(data: bytes, depth: int) -> bytes:
    """Copy a message, changed inside the fields of `PATH`; at its end the message is an attribute."""
    at_attribute = depth == len(PATH)
    if at_attribute and ATTRIBUTE not in data:
        return data
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            wanted = at_attribute and field == INTEGER
            parts.append(_encoded(key) + _encoded(value - 1) if wanted else data[start:at])
        elif kind == 2:
            length, at = _varint(data, at)
            inner, at = data[at : at + length], at + length
            if not at_attribute and field == PATH[depth]:
                inner = _message(inner, depth + 1)
                parts.append(_encoded(key) + _encoded(len(inner)) + inner)
            else:
                parts.append(data[start:at])
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
            parts.append(data[start:at])
        else:
            raise ValueError("not an ONNX model")
        if at > len(data):
            raise ValueError("not an ONNX model: it is cut short")
    return b"".join(parts)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("not an ONNX model: it is cut short")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value, at


def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
