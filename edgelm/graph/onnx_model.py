"""The messages of an ONNX model that are read or written here (onnx.proto of ONNX's IR version 10), in their bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from edgelm.graph.protobuf import FIXED32, LENGTH_DELIMITED, VARINT, Field, encode_message, parse_fields

FLOAT, UINT8, INT8, INT32, INT64, FLOAT16 = 1, 2, 3, 6, 7, 10
"""Values of TensorProto.DataType."""

ORT_DOMAINS: Final = frozenset({"", "ai.onnx", "com.microsoft"})
"""Domains of ONNX's and onnxruntime's operators."""

_GRAPH, _OPSET = 7, 8  # ModelProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT = 1, 5, 11, 12  # GraphProto
_INT: Final = 2  # AttributeProto.AttributeType
_BODIES: Final = frozenset({5, 6, 10, 11, 22, 23})  # AttributeProto
_PLACE: Final = re.compile("[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Node:
    """A NodeProto.

    `attributes` are its numbers, `string_attributes` its strings, `nested_messages` its tensors and graphs. A body is
    a field of AttributeProto: 5 and 10 are tensors, 6 and 11 graphs, 22 and 23 sparse tensors.
    """

    domain: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, float]
    string_attributes: Mapping[str, bytes]
    nested_messages: Sequence[tuple[int, bytes]]
    encoded: bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A TensorProto; `external_range` are the bytes of the file `location` that hold its values, if they lie in one."""

    name: str
    shape: tuple[int, ...]
    dtype: int
    external_range: slice | None
    location: str
    raw: bytes
    encoded: bytes


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """A ValueInfoProto: a tensor's type and its dimensions, 0 for those that are open."""

    dtype: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A ModelProto: its nodes in their order, its initializers, inputs, outputs, and all the rest.

    Of tensors of one name `tensors` has the last.
    """

    nodes: Sequence[Node]
    all_tensors: Sequence[Tensor]
    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, ValueInfo]
    outputs: Mapping[str, ValueInfo]
    rest: Sequence[Field]
    graph_rest: Sequence[Field]


def is_ort_operator(node: Node, *operators: str) -> bool:
    """Whether a node is one of some operators of ONNX's or onnxruntime's: another domain may have the same names."""
    return node.domain in ORT_DOMAINS and node.op_type in operators


def read_model(data: bytes) -> Model:
    """Read a model. Raises `ValueError` for what is none."""
    try:
        whole = list(parse_fields(data))
        graph = [field for number, _, value in whole if number == _GRAPH for field in parse_fields(_content(value))]
        tensors = [read_tensor(_content(value)) for number, _, value in graph if number == _INITIALIZER]
        return Model(
            nodes=[read_node(_content(value)) for number, _, value in graph if number == _NODE],
            all_tensors=tensors,
            tensors={tensor.name: tensor for tensor in tensors},
            inputs={_text(value, 1): _value(_content(value)) for number, _, value in graph if number == _INPUT},
            outputs={_text(value, 1): _value(_content(value)) for number, _, value in graph if number == _OUTPUT},
            rest=[field for field in whole if field[0] != _GRAPH],
            graph_rest=[field for field in graph if field[0] not in (_NODE, _INITIALIZER)],
        )
    except (ValueError, KeyError, struct.error) as error:
        raise ValueError(f"not an ONNX model: {error}") from error


def encode_model(model: Model, nodes: Sequence[bytes], tensors: Sequence[bytes], domain: str | None = None) -> bytes:
    """Return a model with other nodes and initializers, which may use a further domain's operators of version 1."""
    opset: list[Field] = []
    if domain is not None:
        opset.append(
            (_OPSET, LENGTH_DELIMITED, encode_message([(1, LENGTH_DELIMITED, domain.encode()), (2, VARINT, 1)]))
        )
    graph: list[Field] = [(_NODE, LENGTH_DELIMITED, node) for node in nodes]
    graph += [(_INITIALIZER, LENGTH_DELIMITED, tensor) for tensor in tensors]
    return encode_message(
        [*model.rest, *opset, (_GRAPH, LENGTH_DELIMITED, encode_message([*graph, *model.graph_rest]))]
    )


def encode_node(
    name: str, operator: str, domain: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, int]
) -> bytes:
    """Return a NodeProto with attributes that are integers."""
    names: list[Field] = [(1, LENGTH_DELIMITED, each.encode()) for each in inputs]
    names += [(2, LENGTH_DELIMITED, each.encode()) for each in outputs]
    values: list[Field] = [
        (
            5,
            LENGTH_DELIMITED,
            encode_message([(1, LENGTH_DELIMITED, key.encode()), (3, VARINT, value), (20, VARINT, _INT)]),
        )
        for key, value in attributes.items()
    ]
    return encode_message(
        [
            *names,
            (3, LENGTH_DELIMITED, name.encode()),
            (4, LENGTH_DELIMITED, operator.encode()),
            *values,
            (7, LENGTH_DELIMITED, domain.encode()),
        ]
    )


def encode_tensor(name: str, shape: Sequence[int], dtype: int, file: str, offset: int, length: int) -> bytes:
    """Return a TensorProto whose values lie in a file beside the model."""
    place = {"location": file, "offset": str(offset), "length": str(length)}
    entries: list[Field] = [
        (
            13,
            LENGTH_DELIMITED,
            encode_message([(1, LENGTH_DELIMITED, key.encode()), (2, LENGTH_DELIMITED, value.encode())]),
        )
        for key, value in place.items()
    ]
    dims: list[Field] = [(1, VARINT, size) for size in shape]
    return encode_message([*dims, (2, VARINT, dtype), (8, LENGTH_DELIMITED, name.encode()), *entries, (14, VARINT, 1)])


def read_node(encoded: bytes) -> Node:
    """Read a NodeProto. Raises `ValueError` for what is none."""
    inputs: list[str] = []
    outputs: list[str] = []
    attributes: dict[str, float] = {}
    string_attributes: dict[str, bytes] = {}
    nested_messages: list[tuple[int, bytes]] = []
    operator = domain = ""
    for number, _, value in parse_fields(encoded):
        if number == 1:
            inputs.append(_content(value).decode())
        elif number == 2:
            outputs.append(_content(value).decode())
        elif number == 4:
            operator = _content(value).decode()
        elif number == 5:
            _read_attribute(_content(value), attributes, string_attributes, nested_messages)
        elif number == 7:
            domain = _content(value).decode()
    return Node(
        domain, operator, tuple(inputs), tuple(outputs), attributes, string_attributes, nested_messages, encoded
    )


def _read_attribute(
    encoded: bytes,
    numbers: dict[str, float],
    string_attributes: dict[str, bytes],
    nested_messages: list[tuple[int, bytes]],
) -> None:
    """Add an attribute to those of its type; to none where it is of another type."""
    parts = list(parse_fields(encoded))
    name = next((_content(value).decode() for number, _, value in reversed(parts) if number == 1), "")
    for number, wire_type, value in parts:
        if (number, wire_type) == (3, VARINT):
            signed = int(value)
            numbers[name] = signed - (1 << 64) if signed >> 63 else signed
        elif (number, wire_type) == (2, FIXED32):
            numbers[name] = struct.unpack("<f", _content(value))[0]
        elif (number, wire_type) == (4, LENGTH_DELIMITED):
            string_attributes[name] = _content(value)
        elif number in _BODIES:
            nested_messages.append((number, _content(value)))


def read_tensor(encoded: bytes) -> Tensor:
    """Read a TensorProto. Raises `ValueError` for what is none."""
    shape: list[int] = []
    name, dtype, raw, external, location = "", 0, b"", False, ""
    where: dict[str, int] = {}
    for number, _, value in parse_fields(encoded):
        if number == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == 2:
            dtype = int(value)
        elif number == 8:
            name = _content(value).decode()
        elif number == 9:
            raw = _content(value)
        elif number == 13:
            external = True
            key, told = _text(value, 1), _text(value, 2)
            if key == "location":
                location = told
            elif key in ("offset", "length"):
                where[key] = _whole(told)
        elif number == 14 and value == 1:
            external = True
    start = where.get("offset", 0)
    place = slice(start, start + where["length"] if "length" in where else None)
    return Tensor(name, tuple(shape), dtype, place if external else None, location, raw, encoded)


def _whole(text: str) -> int:
    """Return a place or length in a file."""
    if not _PLACE.fullmatch(text):
        raise ValueError(f"a place in a file that is no number: {text!r:.40}")
    return int(text)


def _value(encoded: bytes) -> ValueInfo:
    tensor = _inside(_inside(encoded, 2), 1)  # ValueInfoProto.type, TypeProto.tensor_type
    dtype = next((int(value) for number, _, value in parse_fields(tensor) if number == 1), 0)
    dims = [_content(value) for number, _, value in parse_fields(_inside(tensor, 2)) if number == 1]
    return ValueInfo(
        dtype, tuple(next((int(v) for number, _, v in parse_fields(dim) if number == 1), 0) for dim in dims)
    )


def _inside(encoded: bytes, wanted: int) -> bytes:
    """Return a message in a message; an empty one where there is none."""
    return next((_content(value) for number, _, value in parse_fields(encoded) if number == wanted), b"")


def _text(encoded: int | bytes, wanted: int) -> str:
    """Return a text field of a message, the last one as Protobuf has it; empty where there is none."""
    found = b""
    for number, _, value in parse_fields(_content(encoded)):
        if number == wanted:
            found = _content(value)
    return found.decode()


def _content(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _varints(packed: bytes) -> list[int]:
    """Return the numbers of a packed field: as fields of a message they would each have a key in front."""
    return [int(value) for _, _, value in parse_fields(b"".join(b"\x08" + number for number in _split(packed)))]


def _split(packed: bytes) -> list[bytes]:
    """Cut numbers apart: each ends with the first byte below 128."""
    ends = [i + 1 for i, byte in enumerate(packed) if byte < 0x80]
    return [packed[start:end] for start, end in zip([0, *ends], ends, strict=False)]
