"""ONNX models at run time: the messages of onnx.proto (IR version 10) that edgelm reads, checks or writes.

Parsing and serialization are google.protobuf's, which every installation of onnxruntime has. The descriptor below holds
only the fields that edgelm uses; protobuf keeps all other fields of a model unchanged. protobuf is imported when the
first model is read: a start from the board cache does not need it. The only importer of google.protobuf.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

FLOAT, UINT8, INT8, INT32, INT64, FLOAT16 = 1, 2, 3, 6, 7, 10
"""Values of TensorProto.DataType."""

ORT_DOMAINS: Final = frozenset({"", "ai.onnx", "com.microsoft"})
"""Domains of ONNX's and onnxruntime's operators."""

Message: TypeAlias = Any
"""A protobuf message; its class is built at run time from `_FIELDS`."""

_INT: Final = 2
"""AttributeProto.AttributeType.INT"""
_EXTERNAL: Final = 1
"""TensorProto.DataLocation.EXTERNAL"""
_DECIMAL: Final = re.compile("[0-9]{1,18}")

_SCALAR_TYPES: Final = {"float": 2, "int64": 3, "int32": 5, "string": 9, "bytes": 12}
"""Values of FieldDescriptorProto.Type."""
_OPTIONAL, _REPEATED, _MESSAGE = 1, 3, 11
"""Values of FieldDescriptorProto.Label, and its type of a nested message."""
_FIELDS: Final = {
    "ModelProto": "graph:GraphProto=7 opset_import:OperatorSetId*=8 metadata_props:Entry*=14 training_info:bytes*=20"
    " functions:bytes*=25",
    "OperatorSetId": "domain:string=1 version:int64=2",
    "Entry": "key:string=1 value:string=2",
    "GraphProto": "node:NodeProto*=1 name:string=2 initializer:TensorProto*=5 input:ValueInfo*=11 output:ValueInfo*=12"
    " sparse_initializer:bytes*=15",
    "NodeProto": "input:string*=1 output:string*=2 name:string=3 op_type:string=4 attribute:Attribute*=5"
    " domain:string=7",
    "Attribute": "name:string=1 f:float=2 i:int64=3 s:bytes=4 t:TensorProto=5 g:GraphProto=6 tensors:TensorProto*=10"
    " graphs:GraphProto*=11 type:int32=20 sparse_tensor:bytes=22 sparse_tensors:bytes*=23",
    "TensorProto": "dims:int64*=1 data_type:int32=2 name:string=8 raw_data:bytes=9 external_data:Entry*=13"
    " data_location:int32=14",
    "ValueInfo": "name:string=1 type:Type=2",
    "Type": "tensor_type:TensorType=1",
    "TensorType": "elem_type:int32=1 shape:Shape=2",
    "Shape": "dim:Dimension*=1",
    "Dimension": "dim_value:int64=1",
}
"""Messages and their fields as name:type=number; `*` marks a repeated field."""


@dataclass(frozen=True, slots=True)
class Node:
    """A NodeProto: `attributes` are its numbers, `string_attributes` its strings; `message` has all of it."""

    domain: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, float]
    string_attributes: Mapping[str, bytes]
    message: Message

    @property
    def encoded(self) -> bytes:
        """The serialized NodeProto."""
        return bytes(self.message.SerializeToString())


@dataclass(frozen=True, slots=True)
class Tensor:
    """A TensorProto; `external_range` are the bytes of the file `location` that hold its values, None if inline."""

    name: str
    shape: tuple[int, ...]
    dtype: int
    external_range: slice | None
    location: str
    raw: bytes
    message: Message

    @property
    def encoded(self) -> bytes:
        """The serialized TensorProto."""
        return bytes(self.message.SerializeToString())


@dataclass(frozen=True, slots=True)
class ValueInfo:
    """A ValueInfoProto: a tensor's type and its dimensions, 0 for dynamic ones."""

    dtype: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A ModelProto: its nodes in graph order, its initializers, inputs and outputs; `message` has all of it.

    If several initializers have one name, `tensors` has the last.
    """

    nodes: Sequence[Node]
    all_tensors: Sequence[Tensor]
    tensors: Mapping[str, Tensor]
    inputs: Mapping[str, ValueInfo]
    outputs: Mapping[str, ValueInfo]
    message: Message


def is_ort_operator(node: Node, *operators: str) -> bool:
    """Return whether a node is one of these operators in a domain of ONNX or onnxruntime."""
    return node.domain in ORT_DOMAINS and node.op_type in operators


def message_class(name: str) -> Any:
    """Return the class of a message of `_FIELDS`."""
    return _message_classes()[name]


def read_model(data: bytes) -> Model:
    """Read a model. Raises `ValueError` if the bytes are not an ONNX model."""
    message = _parse_model(data)
    graph = message.graph
    try:
        tensors = [read_tensor(tensor) for tensor in graph.initializer]
        return Model(
            nodes=[read_node(node) for node in graph.node],
            all_tensors=tensors,
            tensors={tensor.name: tensor for tensor in tensors},
            inputs={value.name: _read_value(value) for value in graph.input},
            outputs={value.name: _read_value(value) for value in graph.output},
            message=message,
        )
    except ValueError as error:
        raise ValueError(f"not an ONNX model: {error}") from error


def read_node(message: Message) -> Node:
    """Read a NodeProto."""
    attributes: dict[str, float] = {}
    string_attributes: dict[str, bytes] = {}
    for attribute in message.attribute:
        if attribute.HasField("i"):
            attributes[attribute.name] = attribute.i
        if attribute.HasField("f"):
            attributes[attribute.name] = attribute.f
        if attribute.HasField("s"):
            string_attributes[attribute.name] = attribute.s
    inputs, outputs = tuple(message.input), tuple(message.output)
    return Node(message.domain, message.op_type, inputs, outputs, attributes, string_attributes, message)


def read_tensor(message: Message) -> Tensor:
    """Read a TensorProto. Raises `ValueError` for an offset or length that is not a number."""
    entries = {entry.key: entry.value for entry in message.external_data}
    is_external = bool(entries) or message.data_location == _EXTERNAL
    start = _parse_decimal(entries.get("offset", "0"))
    stop = start + _parse_decimal(entries["length"]) if "length" in entries else None
    return Tensor(
        message.name,
        tuple(message.dims),
        message.data_type,
        slice(start, stop) if is_external else None,
        entries.get("location", ""),
        message.raw_data,
        message,
    )


def encode_model(model: Model, nodes: Sequence[bytes], tensors: Sequence[bytes], domain: str | None = None) -> bytes:
    """Return a model with other nodes and initializers.

    nodes, tensors: serialized NodeProtos and TensorProtos. domain: an additional operator set, of version 1.
    """
    message = type(model.message)()
    message.CopyFrom(model.message)
    if domain is not None:
        message.opset_import.add(domain=domain, version=1)
    del message.graph.node[:], message.graph.initializer[:]
    for node in nodes:
        message.graph.node.add().MergeFromString(node)
    for tensor in tensors:
        message.graph.initializer.add().MergeFromString(tensor)
    return bytes(message.SerializeToString())


def encode_node(
    name: str, operator: str, domain: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, int]
) -> bytes:
    """Return a serialized NodeProto with integer attributes."""
    node = message_class("NodeProto")(name=name, op_type=operator, domain=domain, input=inputs, output=outputs)
    for key, value in attributes.items():
        node.attribute.add(name=key, i=value, type=_INT)
    return bytes(node.SerializeToString())


def encode_tensor(name: str, shape: Sequence[int], dtype: int, file: str, offset: int, length: int) -> bytes:
    """Return a serialized TensorProto whose values lie in a file beside the model."""
    tensor = message_class("TensorProto")(name=name, dims=shape, data_type=dtype, data_location=_EXTERNAL)
    for key, value in {"location": file, "offset": str(offset), "length": str(length)}.items():
        tensor.external_data.add(key=key, value=value)
    return bytes(tensor.SerializeToString())


def change_attribute(data: bytes, name: str, change: Callable[[int], int]) -> bytes:
    """Return a model in which an integer attribute is changed in every node that has it.

    Raises `ValueError` if the bytes are not an ONNX model.
    """
    message = _parse_model(data)
    found = [each for node in message.graph.node for each in node.attribute if each.name == name and each.HasField("i")]
    for attribute in found:
        attribute.i = change(attribute.i)
    return bytes(message.SerializeToString()) if found else data


def add_metadata(data: bytes, key: str, value: str) -> bytes:
    """Return a model with one more entry of metadata. Protobuf merges messages whose bytes follow each other."""
    addition = message_class("ModelProto")()
    addition.metadata_props.add(key=key, value=value)
    return data + bytes(addition.SerializeToString())


@functools.cache
def _message_classes() -> Mapping[str, Any]:
    """Return the classes of all messages of `_FIELDS`, by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    # As in onnx.proto, which is proto2, every field has presence and no list is packed. The syntax is proto3 because it
    # refuses strings that are not UTF-8; proto2 would return them as bytes.
    file = descriptor_pb2.FileDescriptorProto(name="edgelm_onnx.proto", package="edgelm_onnx", syntax="proto3")
    for message_name, fields in _FIELDS.items():
        message = file.message_type.add(name=message_name)
        for declaration in fields.split():
            name, kind, number = re.split("[:=]", declaration)
            field = message.field.add(name=name, number=int(number))
            field.label = _REPEATED if kind.endswith("*") else _OPTIONAL
            kind = kind.removesuffix("*")
            field.type = _SCALAR_TYPES.get(kind, _MESSAGE)
            if field.type == _MESSAGE:
                field.type_name = f".{file.package}.{kind}"
            elif field.label == _OPTIONAL:
                field.proto3_optional, field.oneof_index = True, len(message.oneof_decl)
                message.oneof_decl.add(name=f"_{name}")
            elif kind == "int64":
                field.options.packed = False
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}")) for name in _FIELDS
    }


def _parse_model(data: bytes) -> Message:
    """Return the ModelProto. Raises `ValueError` if the bytes are not one."""
    from google.protobuf.message import DecodeError

    try:
        return message_class("ModelProto").FromString(data)
    except DecodeError as error:
        raise ValueError(f"not an ONNX model: {error}") from error


def _parse_decimal(text: str) -> int:
    """Return an offset or length in a file."""
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"the offset or length of external data is not a number: {text!r:.40}")
    return int(text)


def _read_value(message: Message) -> ValueInfo:
    tensor = message.type.tensor_type
    return ValueInfo(tensor.elem_type, tuple(dim.dim_value for dim in tensor.shape.dim))
