"""Checks that a bundle's graph is one that edgelm could have exported, once, before anything computes with it.

A bundle is untrusted: the manifest's hashes only prove that the files are the ones its author listed. So every
operator, shape, offset and file in the graph is compared with the manifest and with the other tensors. The kernels
check shapes that change from call to call (`edgelm.kernels.ir.kernel_context`), and onnxruntime checks its own
operators. Knows nothing of onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from edgelm.bundle.bundle_folder import Bundle
from edgelm.errors import BundleError
from edgelm.graph.domain import BATCH_INVARIANT_KEY, DOMAIN, MAX_MATRIX_DIM
from edgelm.graph.onnx_model import (
    FLOAT,
    FLOAT16,
    INT8,
    INT32,
    INT64,
    ORT_DOMAINS,
    UINT8,
    Model,
    Node,
    Tensor,
    ValueInfo,
    read_model,
    read_node,
    read_tensor,
)
from edgelm.graph.shape_inference import ShapeInference

MAX_TENSOR_BYTES: Final = 1 << 40
"""Maximum size of a tensor."""
MAX_GRAPH_BYTES: Final = 2_000_000_000
"""Maximum size of a graph without its data file: Protobuf's limit."""
MAX_DEPTH: Final = 4
"""Maximum depth of nested graphs."""

UNBOUNDED_OPERATORS: Final = frozenset({"Loop", "Scan"})
"""Operators that no decoder needs, and that can run forever."""

_ITEM_BYTES: Final = {
    1: 4.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 4.0, 7: 8.0, 9: 1.0, 10: 2.0, 11: 8.0, 12: 4.0, 13: 8.0, 16: 2.0,
    17: 1.0, 18: 1.0, 19: 1.0, 20: 1.0, 21: 0.5, 22: 0.5,
}  # fmt: skip
"""Bytes of an element, by TensorProto.DataType. Strings and complex numbers are not allowed."""

_BITS: Final = (2, 4, 8)
_BLOCKS: Final = (16, 32, 64, 128, 256)
_FIXED: Final = {
    "shared": {"input_ids": INT64, "seqlens_k": INT32, "total_sequence_length": INT32, "rows": INT64},
    "growing": {"input_ids": INT64},
}
"""Required inputs and their types, by the kind of the KV cache, besides keys and values."""
_OPTIONAL: Final = {
    "shared": {"positions": INT64},
    "growing": {"attention_mask": INT64, "position_ids": INT64, "rows": INT64},
}
"""Optional inputs and their types, by the kind of the KV cache."""
_PASTS: Final = {"shared": "past", "growing": "past_key_values"}
"""Prefix of the inputs for keys and values, by the kind of the KV cache."""


class _InvalidGraphError(ValueError):
    """The graph is invalid; the message completes the sentence "edgelm cannot load FILE: ..."."""


def check_graph(bundle: Bundle) -> None:
    """Raise `BundleError` if a bundle's graph is inconsistent with its manifest, its files or itself.

    The bundle's files must have been verified before. Takes about 25 microseconds per node.
    """
    try:
        if bundle.graph.stat().st_size > MAX_GRAPH_BYTES:
            raise _InvalidGraphError(f"it is larger than {MAX_GRAPH_BYTES} bytes")
        model = read_model(bundle.graph.read_bytes())
        _GraphCheck(bundle, model).run()
    except OSError as error:
        raise BundleError(f"{bundle.graph} cannot be read: {error.strerror or error}") from error
    except (ValueError, OverflowError, IndexError) as error:
        raise BundleError(
            f"edgelm cannot load {bundle.graph}: {error}; export the model again, or get the bundle from a source that"
            " you trust"
        ) from error


class _GraphCheck:
    """One check of a model."""

    def __init__(self, bundle: Bundle, model: Model) -> None:
        self._manifest = bundle.manifest
        self._folder = bundle.path
        self._model = model
        self._data = f"{bundle.manifest.graph}.data"
        self._data_bytes = _size_of(bundle, self._data)
        self._producers: dict[str, Node] = {}
        self._shapes = ShapeInference(model, bundle.manifest) if bundle.manifest.cache.kind == "shared" else None

    def run(self) -> None:
        """Raise `_InvalidGraphError` or another `ValueError` if the model is invalid."""
        self._check_model()
        self._check_names()
        for tensor in self._model.all_tensors:
            self._check_tensor(tensor)
        self._check_values()
        for node in self._model.nodes:
            self._check_node(node)
            self._check_sizes(node)
            if self._shapes is not None:
                self._shapes.infer(node)
        if self._shapes is not None:
            self._check_results(self._shapes)

    # -- the model as a whole -----------------------------------------------------------------------------------

    def _check_model(self) -> None:
        message = self._model.message
        if message.functions:
            raise _InvalidGraphError("it defines functions, which are not allowed")
        if any(entry.key == BATCH_INVARIANT_KEY for entry in message.metadata_props):
            raise _InvalidGraphError(f"its metadata has the key {BATCH_INVARIANT_KEY}, which only the board may set")
        if message.training_info:
            raise _InvalidGraphError("it has training information, which is not allowed")
        for opset in message.opset_import:
            if opset.domain not in ORT_DOMAINS and not opset.domain.startswith("ai.onnx"):
                raise _InvalidGraphError(f"it imports the domain {opset.domain!r:.60}, which is not allowed")
        if message.graph.sparse_initializer:
            raise _InvalidGraphError("it has sparse tensors, which are not allowed")

    def _check_names(self) -> None:
        """Refuse duplicate names, of which readers may use either value, and names that are read but not defined."""
        seen: set[str] = set()
        names = [tensor.name for tensor in self._model.all_tensors] + list(self._model.inputs)
        names += [name for node in self._model.nodes for name in node.outputs if name]
        for name in names:
            if not name or name in seen:
                raise _InvalidGraphError(f"the name {name!r:.60} is empty or defined twice")
            seen.add(name)
        for node in self._model.nodes:
            if not node.outputs:
                raise _InvalidGraphError(f"a node {node.op_type!r:.40} has no outputs")
            self._producers |= {name: node for name in node.outputs if name}
            for name in node.inputs:
                if name and name not in seen:
                    raise _InvalidGraphError(f"{name!r:.60} is read but not defined")

    # -- tensors ------------------------------------------------------------------------------------------------

    def _check_tensor(self, tensor: Tensor) -> None:
        size = _bytes_of(tensor)
        if tensor.external_range is None:
            if tensor.raw and len(tensor.raw) != size:
                raise _InvalidGraphError(f"{tensor.name!r:.60} has {len(tensor.raw)} bytes, its shape needs {size}")
            return
        name = tensor.location
        if name != self._data or self._data_bytes is None:
            raise _InvalidGraphError(
                f"{tensor.name!r:.60} is stored in {name!r:.80}; weights must be stored in {self._data}, listed in the"
                " manifest"
            )
        start = tensor.external_range.start
        length = size if tensor.external_range.stop is None else tensor.external_range.stop - start
        if length != size or start + size > self._data_bytes:
            raise _InvalidGraphError(
                f"{tensor.name!r:.60} has {length} bytes at offset {start} of {name}, its shape needs {size}, the file"
                f" has {self._data_bytes}"
            )

    def _source(self, name: str) -> Tensor | None:
        """Return the stored tensor of a value, or the one that is cast to it; None for computed values."""
        producer = self._producers.get(name)
        if producer is not None and producer.op_type == "Cast" and producer.inputs:
            name = producer.inputs[0]
        return self._model.tensors.get(name)

    # -- inputs and outputs -------------------------------------------------------------------------------------

    def _check_values(self) -> None:
        cache = self._manifest.cache
        fixed, optional, past = _FIXED[cache.kind], _OPTIONAL[cache.kind], _PASTS[cache.kind]
        pasts = [f"{past}.{layer}.{part}" for layer in range(cache.layers) for part in ("key", "value")]
        dtype = INT8 if cache.bits == 8 else FLOAT
        required = {**fixed, **dict.fromkeys(pasts, dtype)}
        missing = required.keys() - self._model.inputs.keys()
        unknown = self._model.inputs.keys() - required.keys() - optional.keys()
        if missing or unknown:
            names = ", ".join(sorted(missing or unknown)[:3])
            raise _InvalidGraphError(f"it has {'no' if missing else 'an unknown'} input {names:.200}")
        for name, value in self._model.inputs.items():
            expected = {**required, **optional}[name]
            if value.dtype != expected:
                raise _InvalidGraphError(f"the input {name} has the type {value.dtype}, expected {expected}")
            if name in pasts:
                self._check_kv_cache(name, value)
        for name in ("logits", *(f"present.{each.removeprefix(f'{past}.')}" for each in pasts)):
            if name not in self._model.outputs:
                raise _InvalidGraphError(f"it has no output {name}")
        width = self._model.outputs["logits"].shape[-1:]
        if width not in {(), (0,), (self._manifest.vocab_size,)}:
            raise _InvalidGraphError(f"it returns {width[0]} logits, the vocabulary has {self._manifest.vocab_size}")

    def _check_results(self, shapes: ShapeInference) -> None:
        """Refuse logits that are not [rows, vocabulary], and present keys or values of another shape than the past."""
        found = shapes.shape_of("logits")
        if found != ("rows", self._manifest.vocab_size):
            raise _InvalidGraphError(f"it returns logits {list(found)}, expected {['rows', self._manifest.vocab_size]}")
        for past in self._model.inputs:
            present = past.replace("past.", "present.", 1)
            if past != present and shapes.shape_of(present) != shapes.shape_of(past):
                raise _InvalidGraphError(f"{present} does not have the shape of {past}")

    def _check_kv_cache(self, name: str, value: ValueInfo) -> None:
        """Refuse keys or values that are not [batch, heads, positions, size]."""
        cache = self._manifest.cache
        expected = (0, cache.kv_heads, 0, cache.head_size)
        fits = len(value.shape) == len(expected) and all(
            size in (0, wanted) for size, wanted in zip(value.shape, expected, strict=True)
        )
        if not fits or (cache.kind == "shared" and value.shape[1::2] != expected[1::2]):
            raise _InvalidGraphError(
                f"{name} has the shape {list(value.shape)}, the manifest needs {list(expected)} (0: any number)"
            )

    # -- nodes --------------------------------------------------------------------------------------------------

    def _check_node(self, node: Node, depth: int = 0) -> None:
        """Refuse operators that no bundle may contain, and check the attributes of a node."""
        if node.domain == DOMAIN:
            raise _InvalidGraphError(
                f"it contains {node.op_type!r:.40} of the domain {DOMAIN!r}, which only the board may use"
            )
        if node.domain not in ORT_DOMAINS:
            raise _InvalidGraphError(
                f"it contains {node.op_type!r:.40} of the domain {node.domain!r:.60}, which is not allowed"
            )
        if node.op_type in UNBOUNDED_OPERATORS:
            raise _InvalidGraphError(f"it contains {node.op_type}, which can run forever")
        for attribute in node.message.attribute:
            self._check_attribute(attribute, depth)

    def _check_attribute(self, attribute: Any, depth: int) -> None:
        """Check the tensors and graphs of an AttributeProto."""
        for message in (*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])):
            tensor = read_tensor(message)
            _bytes_of(tensor)
            if tensor.external_range is not None:
                raise _InvalidGraphError(f"an attribute's tensor is stored in the file {tensor.location!r:.80}")
        graphs = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        if (graphs and depth >= MAX_DEPTH) or attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise _InvalidGraphError(f"it has graphs nested more than {MAX_DEPTH} deep, or a sparse tensor")
        for graph in graphs:
            for node in graph.node:
                self._check_node(read_node(node), depth + 1)
            for initializer in graph.initializer:
                self._check_tensor(read_tensor(initializer))
            if graph.sparse_initializer:
                raise _InvalidGraphError("it has sparse tensors, which are not allowed")

    def _check_sizes(self, node: Node) -> None:
        """Check the attributes and tensor sizes of operators that read quantized weights, or keys and values."""
        if node.op_type == "MatMulNBits":
            self._check_matmul(node)
        elif node.op_type == "GatherBlockQuantized":
            self._check_table(node)
        elif node.op_type == "GroupQueryAttention":
            self._check_attention(node)

    def _check_matmul(self, node: Node) -> None:
        bits, block, columns, size = (_number(node, name) for name in ("bits", "block_size", "N", "K"))
        if (
            bits not in _BITS
            or block not in _BLOCKS
            or not 1 <= size <= MAX_MATRIX_DIM
            or not 1 <= columns <= MAX_MATRIX_DIM
        ):
            raise _InvalidGraphError(f"a MatMulNBits has K {size}, N {columns}, {bits} bits and blocks of {block}")
        _, codes, scales, zeros, groups, bias, *others = (*node.inputs, *[""] * 6)
        if not codes or not scales or groups or any(others):
            raise _InvalidGraphError("a MatMulNBits has other inputs than codes, scales, zero points and bias")
        blocks = -(-size // block)
        self._require(codes, columns * blocks * block * bits // 8, (UINT8,))
        self._require(scales, columns * blocks, (FLOAT, FLOAT16))
        tensor = self._source(zeros) if zeros else None
        packed = tensor is not None and tensor.dtype == UINT8
        self._require(zeros, columns * (-(-blocks * bits // 8) if packed else blocks), (UINT8, FLOAT, FLOAT16))
        self._require(bias, columns, (FLOAT,), stored=True)

    def _check_table(self, node: Node) -> None:
        bits, block = _number(node, "bits", 4), _number(node, "block_size", 128)
        axes = _number(node, "gather_axis", 0), _number(node, "quantize_axis", 1)
        if bits not in (4, 8) or block not in _BLOCKS or axes != (0, 1) or not 3 <= len(node.inputs) <= 4:
            raise _InvalidGraphError(f"a GatherBlockQuantized has {bits} bits, blocks of {block} and axes {axes}")
        codes, scales = self._source(node.inputs[0]), self._source(node.inputs[2])
        if scales is None or (codes is not None and _count(codes) * 8 != _count(scales) * block * bits):
            raise _InvalidGraphError("the codes of a GatherBlockQuantized do not match its scales")
        if len(node.inputs) == 4:
            rows, blocks = scales.shape[0], _count(scales) // max(scales.shape[0], 1)
            self._require(node.inputs[3], rows * -(-blocks * bits // 8), (UINT8,), stored=True)

    def _check_attention(self, node: Node) -> None:
        cache, manifest = self._manifest.cache, self._manifest
        heads, kv_heads = _number(node, "num_heads"), _number(node, "kv_num_heads")
        if not 1 <= kv_heads <= heads <= MAX_MATRIX_DIM or heads % kv_heads or kv_heads != cache.kv_heads:
            raise _InvalidGraphError(
                f"attention has {heads} query heads and {kv_heads} KV heads, the manifest has {cache.kv_heads} KV heads"
            )
        window = _number(node, "local_window_size", -1)
        if not -1 <= window <= MAX_MATRIX_DIM:
            raise _InvalidGraphError(f"attention has a window of {window}, at most {MAX_MATRIX_DIM} is allowed")
        _, key, value, past_key, past_value, lengths, total, cos, sin, positions, *others = (
            *node.inputs,
            *[""] * 14,
        )[:14]
        layer = past_key.removeprefix("past.").removesuffix(".key")
        past = [f"past.{layer}.key", f"past.{layer}.value"]
        if [past_key, past_value] != past or not set(past) <= self._model.inputs.keys():
            raise _InvalidGraphError(f"attention reads {past_key!r:.60}, {past_value!r:.60}: not the past of a layer")
        if node.outputs[1:] != (f"present.{layer}.key", f"present.{layer}.value"):
            raise _InvalidGraphError(f"attention does not write present.{layer}.key and present.{layer}.value")
        if (lengths, total) != ("seqlens_k", "total_sequence_length") or positions not in ("", "positions"):
            raise _InvalidGraphError("attention does not read seqlens_k, total_sequence_length and positions")
        bias, sink, *scales = others
        if bias or sink or bool(key) != bool(value):
            raise _InvalidGraphError("attention has inputs that `edgelm export` does not write")
        for name in scales:
            self._require(name, kv_heads * cache.head_size, (FLOAT,), stored=True)
        if node.attributes.get("do_rotary", 0):
            is_long = manifest.long_from is not None and manifest.long_from < manifest.context
            self._check_rotary(cos, sin, manifest.context * (2 if is_long else 1))

    def _check_rotary(self, cos: str, sin: str, rows: int) -> None:
        tables = [self._source(name) for name in (cos, sin)]
        shapes = {None if table is None else table.shape for table in tables}
        shape = shapes.pop()
        fits = not shapes and shape is not None and len(shape) == 2
        if shape is None or not fits or shape[0] < rows or not 1 <= 2 * shape[1] <= self._manifest.cache.head_size:
            raise _InvalidGraphError(
                f"the rotary tables must have at least {rows} rows and at most half a head of columns, both alike"
            )

    def _require(self, name: str, count: int, dtypes: Sequence[int], *, stored: bool = False) -> None:
        """Refuse a value with another number of elements or type; onnxruntime checks the types of computed values."""
        tensor = self._source(name) if name else None
        if tensor is None:
            if name and stored:
                raise _InvalidGraphError(f"{name!r:.60} must be a stored tensor")
            if name and self._shapes is not None and self._shapes.count(name) != count:
                raise _InvalidGraphError(f"{name!r:.60} must have {count} elements")
            return
        if _count(tensor) != count or tensor.dtype not in dtypes:
            raise _InvalidGraphError(
                f"{tensor.name!r:.60} has the shape {list(tensor.shape)!s:.80} and type {tensor.dtype}, expected"
                f" {count} elements of type {' or '.join(map(str, dtypes))}"
            )


def _size_of(bundle: Bundle, name: str) -> int | None:
    """Return the size of a file of the bundle; None if it does not exist or the manifest does not list it.

    The manifest of a bundle that is being written lists no files yet.
    """
    if name not in bundle.manifest.files and bundle.manifest.files:
        return None
    file = bundle.path / name
    return file.stat().st_size if file.is_file() else None


def _number(node: Node, name: str, default: int | None = None) -> int:
    value = node.attributes.get(name, default)
    if value is None or value != int(value):
        raise _InvalidGraphError(f"{node.op_type} has no integer attribute {name}")
    return int(value)


def _count(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values. Raises `ValueError` if its shape or type is not allowed."""
    if any(not 0 <= size <= MAX_TENSOR_BYTES for size in tensor.shape):
        raise _InvalidGraphError(f"{tensor.name!r:.60} has the shape {list(tensor.shape[:9])}")
    item = _ITEM_BYTES.get(tensor.dtype)
    if item is None:
        raise _InvalidGraphError(f"{tensor.name!r:.60} has the type {tensor.dtype}")
    size = math.ceil(_count(tensor) * item) if item < 1 else _count(tensor) * int(item)
    if size > MAX_TENSOR_BYTES:
        raise _InvalidGraphError(f"{tensor.name!r:.60} has {size} bytes, at most {MAX_TENSOR_BYTES} are allowed")
    return size
