"""Protobuf's wire format (protobuf.dev/programming-guides/encoding): messages as lists of fields.

Enough to change an ONNX model in its bytes, since the runtime does without the onnx package. Knows no schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
"""Kinds of fields."""

_MAX_VARINT_BITS: Final = 70
"""Bits of a number's bytes, seven each."""

_SIZES: Final = {FIXED64: 8, FIXED32: 4}

Field = tuple[int, int, "int | bytes"]
"""A field's number, its kind, and its value: an int for VARINT, else bytes."""


def parse_fields(message: bytes) -> Iterator[Field]:
    """Yield the fields of a message in their order. Raises `ValueError` for what is no message."""
    at, end = 0, len(message)
    while at < end:
        key = message[at]
        at += 1
        if key > 0x7F:  # most numbers take one byte, and a call takes longer than all the rest
            key, at = _varint(message, at - 1)
        number, wire_type = key >> 3, key & 7
        if wire_type in (LENGTH_DELIMITED, VARINT):
            size, at = _varint(message, at) if at >= end or message[at] > 0x7F else (message[at], at + 1)
            if wire_type == VARINT:
                yield number, wire_type, size
                continue
        elif wire_type in _SIZES:
            size = _SIZES[wire_type]
        else:
            raise ValueError(f"not a protobuf message: kind {wire_type}")
        if at + size > end:
            raise ValueError("not a protobuf message: it is cut short")
        yield number, wire_type, message[at : at + size]
        at += size


def encode_message(parts: Iterable[Field]) -> bytes:
    """Return the bytes of a message."""
    data = bytearray()
    for number, wire_type, value in parts:
        data += _encoded(number << 3 | wire_type)
        if isinstance(value, int):
            data += _encoded(value % (1 << 64))  # negative numbers are two's complements
        else:
            if wire_type == LENGTH_DELIMITED:
                data += _encoded(len(value))
            data += value
    return bytes(data)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("not a protobuf message: it is cut short")
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 0x80:
            return value % (1 << 64), at
        if shift >= _MAX_VARINT_BITS:
            raise ValueError("not a protobuf message: a number of more than ten bytes")


def _encoded(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
