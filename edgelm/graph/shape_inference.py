"""Infers the shape of every value of a decoder's graph, with one rule for each operator.

Covers the operators that `edgelm export` writes, with the inputs that it gives them; any other use raises `ShapeError`.
Shapes are tuples of integers, and of names for dimensions that change from call to call: "batch", "sequence", "tokens"
(batch * sequence), "rows", "capacity".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import numpy as np

from edgelm.bundle.manifest import Manifest
from edgelm.graph.onnx_model import INT64, UINT8, Model, Node, Tensor

Shape = tuple["int | str", ...]

MAX_RANK: Final = 8
MAX_VALUES: Final = 1 << 40
"""Maximum number of elements of a value with a constant shape."""

_TOKENS: Final = ("batch", "sequence")


class ShapeError(ValueError):
    """An operator is used in a way in which `edgelm export` does not use it."""


class ShapeInference:
    """The shapes of a model's values. `infer` must be called for each node, in the model's order."""

    def __init__(self, model: Model, manifest: Manifest) -> None:
        cache = manifest.cache
        self._manifest = manifest
        self._tensors = model.tensors
        self._known: dict[str, Shape] = {name: tensor.shape for name, tensor in model.tensors.items()}
        self._known |= {"input_ids": _TOKENS, "positions": _TOKENS, "seqlens_k": ("batch",), "rows": ("rows",)}
        self._known["total_sequence_length"] = (1,)
        self._kv_cache_shape: Shape = ("batch", cache.kv_heads, "capacity", cache.head_size)
        self._known |= {name: self._kv_cache_shape for name in model.inputs if name.startswith("past.")}
        self._rules: Mapping[str, Callable[[Node], list[Shape]]] = {
            **dict.fromkeys(("Cast", "FastGelu", "Gelu", "Identity", "QuickGelu", "Relu", "Tanh"), self._alike),
            **dict.fromkeys(("Add", "Mul"), self._combined),
            **dict.fromkeys(("BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"), self._bits),
            "Gather": self._gather,
            "GatherBlockQuantized": self._look_up,
            "Gemm": self._gemm,
            "GroupQueryAttention": self._attend,
            "MatMul": self._multiply,
            "MatMulNBits": self._multiply_quantized,
            "Reshape": self._reshape,
            "RotaryEmbedding": self._rotate,
            "SimplifiedLayerNormalization": self._normalize,
            "SkipSimplifiedLayerNormalization": self._add_and_normalize,
            "Slice": self._slice,
            "Split": self._split,
            "Unsqueeze": self._unsqueeze,
        }

    def infer(self, node: Node) -> None:
        """Infer the shapes of a node's outputs. Raises `ShapeError` if its inputs or attributes are not allowed."""
        rule = self._rules.get(node.op_type)
        if rule is None:
            raise ShapeError(f"it contains {node.op_type!r:.40}, which `edgelm export` does not write")
        shapes = rule(node)
        if len(shapes) != len(node.outputs):
            raise ShapeError(f"{node.op_type} has {len(node.outputs)} outputs, expected {len(shapes)}")
        self._known |= dict(zip(node.outputs, shapes, strict=True))

    def shape_of(self, name: str) -> Shape:
        """Return a value's shape. Raises `ShapeError` if no earlier node computes the value."""
        shape = self._known.get(name)
        if shape is None:
            raise ShapeError(f"{name!r:.60} is read before it is computed")
        return shape

    def count(self, name: str) -> int:
        """Return the number of elements of a value. Raises `ShapeError` if it changes from call to call."""
        return math.prod(_fixed(self.shape_of(name), name))

    # -- rules --------------------------------------------------------------------------------------------------

    def _inputs(self, node: Node, count: int) -> list[Shape]:
        if len(node.inputs) != count:
            raise ShapeError(f"{node.op_type} has {len(node.inputs)} inputs, expected {count}")
        return [self.shape_of(name) for name in node.inputs]

    def _alike(self, node: Node) -> list[Shape]:
        return self._inputs(node, 1)

    def _combined(self, node: Node) -> list[Shape]:
        """Return the larger of two shapes; the other must be equal, a scalar, or one number for each column."""
        one, other = self._inputs(node, 2)
        larger, smaller = (one, other) if len(one) >= len(other) else (other, one)
        if smaller not in {larger, (), (1,), larger[-1:]}:
            raise ShapeError(f"{node.op_type} reads {_text(one)} and {_text(other)}")
        return [larger]

    def _bits(self, node: Node) -> list[Shape]:
        one, other = (_fixed(shape, node.op_type) for shape in self._inputs(node, 2))
        if other in (one, (1,)) and one:
            return [one]  # the usual case: a mask or a shift
        try:
            shape = np.broadcast_shapes(one, other)
        except ValueError:
            raise ShapeError(f"{node.op_type} reads {_text(one)} and {_text(other)}") from None
        return [_bounded(shape)]

    def _gather(self, node: Node) -> list[Shape]:
        """Return the shape of rows of a table by token id, or of the rows whose logits are requested."""
        source, _ = self._inputs(node, 2)
        if node.attributes.get("axis", 0) != 0 or len(source) != 2:
            raise ShapeError(f"Gather reads {_text(source)}")
        if node.inputs[1] == "rows" and source[0] == "tokens":
            return [("rows", source[1])]
        self._require_table(node.inputs[1], source)
        return [(*_TOKENS, source[1])]

    def _require_table(self, indices: str, source: Shape) -> None:
        if indices != "input_ids" or source[0] != self._manifest.vocab_size:
            raise ShapeError(
                f"a table of {_text(source)} is indexed by {indices!r:.40}, expected {self._manifest.vocab_size} rows"
                " and input_ids"
            )

    def _look_up(self, node: Node) -> list[Shape]:
        source, _, scales, *_ = (self.shape_of(name) for name in node.inputs)
        bits, block = (int(node.attributes.get(name, default)) for name, default in (("bits", 4), ("block_size", 128)))
        self._require_table(node.inputs[1], source)
        _, blocks = _fixed(scales, "scales") if len(scales) == 2 else (0, 0)
        if (
            len(source) != 2
            or scales[0] != source[0]
            or source[1] != blocks * block * bits // 8
            or len(node.inputs) > 4
        ):
            raise ShapeError(f"a table of {_text(source)} has scales {_text(scales)}")
        return [(*_TOKENS, blocks * block)]

    def _gemm(self, node: Node) -> list[Shape]:
        value, matrix = self._inputs(node, 2)
        if node.attributes.get("transB") != 1 or node.attributes.get("transA", 0) or len(value) != 2:
            raise ShapeError(f"Gemm reads {_text(value)}")
        rows, columns = _fixed(matrix, "a matrix") if len(matrix) == 2 else (0, 0)
        return [(*self._leading(node, value, columns), rows)]

    def _multiply(self, node: Node) -> list[Shape]:
        value, matrix = self._inputs(node, 2)
        columns, rows = _fixed(matrix, "a matrix") if len(matrix) == 2 else (0, 0)
        return [(*self._leading(node, value, columns), rows)]

    def _multiply_quantized(self, node: Node) -> list[Shape]:
        columns, rows = (int(node.attributes.get(name, 0)) for name in ("K", "N"))
        return [(*self._leading(node, self.shape_of(node.inputs[0]), columns), rows)]

    def _leading(self, node: Node, value: Shape, columns: int) -> Shape:
        """Return all but the last dimension of a value that is multiplied with a matrix of `columns` columns."""
        if not 2 <= len(value) <= 3 or value[-1] != columns:
            raise ShapeError(f"{node.op_type} with {columns} columns reads {_text(value)}")
        return value[:-1]

    def _attend(self, node: Node) -> list[Shape]:
        heads, kv_heads = (int(node.attributes.get(name, 0)) for name in ("num_heads", "kv_num_heads"))
        size = self._manifest.cache.head_size
        query, key, value, past_key, past_value = (self.shape_of(name) if name else () for name in node.inputs[:5])
        wide = heads if key else heads + 2 * kv_heads
        both = (*_TOKENS, kv_heads * size) if key else ()
        if (
            query != (*_TOKENS, wide * size)
            or {key, value} != {both}
            or {past_key, past_value} != {self._kv_cache_shape}
        ):
            raise ShapeError(f"attention of {heads} query heads reads {_text(query)}, {_text(key)} and {_text(value)}")
        return [(*_TOKENS, heads * size), self._kv_cache_shape, self._kv_cache_shape]

    def _reshape(self, node: Node) -> list[Shape]:
        source, _ = self._inputs(node, 2)
        wanted = self._constant(node.inputs[1])
        if node.attributes.get("allowzero", 0) or not 1 <= len(wanted) <= MAX_RANK:
            raise ShapeError(f"Reshape to {_text(tuple(wanted))}")
        if not any(isinstance(size, str) for size in source):
            if min(wanted) < 1 or math.prod(wanted) != math.prod(_fixed(source, "Reshape")):
                raise ShapeError(f"Reshape of {_text(source)} to {_text(tuple(wanted))}")
            return [tuple(wanted)]
        match wanted:
            case [-1, width] if source == (*_TOKENS, width):
                return [("tokens", width)]
            case [0, 0, heads, size] if heads > 0 and size > 0 and source == (*_TOKENS, heads * size):
                return [(*_TOKENS, heads, size)]
            case [0, 0, width] if source[:2] == _TOKENS and math.prod(_fixed(source[2:], "Reshape")) == width:
                return [(*_TOKENS, width)]
        raise ShapeError(f"Reshape of {_text(source)} to {_text(tuple(wanted))}")

    def _rotate(self, node: Node) -> list[Shape]:
        value, _, cos, sin = self._inputs(node, 4)
        heads, turned = (int(node.attributes.get(name, 0)) for name in ("num_heads", "rotary_embedding_dim"))
        is_long = self._manifest.long_from is not None and self._manifest.long_from < self._manifest.context
        least = self._manifest.context * (2 if is_long else 1)
        size = self._manifest.cache.head_size
        fits = node.inputs[1] == "positions" and value == (*_TOKENS, heads * size) and heads > 0 and cos == sin
        fits = fits and not node.attributes.get("is_packed_batching", 0) and not node.attributes.get("interleaved", 0)
        rows, half = _fixed(cos, "rotary tables") if len(cos) == 2 else (0, 0)
        if not fits or rows < least or not 0 < turned <= size or 2 * half != turned:
            raise ShapeError(
                f"RotaryEmbedding of {_text(value)} with {heads} heads reads tables of {_text(cos)} and {_text(sin)}"
            )
        return [value]

    def _normalize(self, node: Node) -> list[Shape]:
        value, weight = self._inputs(node, 2)
        if node.attributes.get("axis", -1) != -1 or not value or weight != value[-1:]:
            raise ShapeError(f"{node.op_type} of {_text(value)} has weights of {_text(weight)}")
        return [value]

    def _add_and_normalize(self, node: Node) -> list[Shape]:
        value, skip, weight = self._inputs(node, 3)
        if value != skip or not value or weight != value[-1:] or any(node.outputs[1:3]):
            raise ShapeError(f"{node.op_type} of {_text(value)} and {_text(skip)} has weights of {_text(weight)}")
        return [value] * len(node.outputs[:4])

    def _slice(self, node: Node) -> list[Shape]:
        """Return the shape with a shorter last dimension."""
        source, *_ = self._inputs(node, 4)
        start, end, axis = (self._constant(name) for name in node.inputs[1:])
        if (start, axis) != ([0], [-1]) or len(end) != 1 or not source or not _is_within(end[0], source[-1]):
            raise ShapeError(f"Slice of {_text(source)} from {start!s:.40} to {end!s:.40}")
        return [(*source[:-1], end[0])]

    def _split(self, node: Node) -> list[Shape]:
        source = self.shape_of(node.inputs[0])
        width = source[-1] if source else 0
        if node.attributes.get("axis", 0) != -1 or not isinstance(width, int):
            raise ShapeError(f"Split of {_text(source)}")
        count = len(node.outputs)
        sizes = self._constant(node.inputs[1]) if len(node.inputs) > 1 else [width // count] * count
        if sum(sizes) != width or len(sizes) != count or min(sizes) < 1:
            raise ShapeError(f"Split of {_text(source)} into {sizes!s:.60}")
        return [(*source[:-1], size) for size in sizes]

    def _unsqueeze(self, node: Node) -> list[Shape]:
        source, _ = self._inputs(node, 2)
        if self._constant(node.inputs[1]) != [-1] or len(source) >= MAX_RANK:
            raise ShapeError(f"Unsqueeze of {_text(source)}")
        return [(*source, 1)]

    def _constant(self, name: str) -> list[int]:
        """Return the integers of a stored one-dimensional tensor. Raises `ShapeError` for other values."""
        tensor: Tensor | None = self._tensors.get(name)
        if tensor is None or tensor.dtype not in (INT64, UINT8) or len(tensor.shape) != 1 or tensor.shape[0] > MAX_RANK:
            raise ShapeError(f"{name!r:.60} is not a stored list of at most {MAX_RANK} integers")
        dtype: Any = np.dtype("<i8") if tensor.dtype == INT64 else np.dtype("u1")
        if tensor.external_range is not None or len(tensor.raw) != tensor.shape[0] * dtype.itemsize:
            raise ShapeError(f"{name!r:.60} is not stored in the graph")
        return [int(value) for value in np.frombuffer(tensor.raw, dtype)]


def _is_within(value: int, maximum: int | str) -> bool:
    return isinstance(maximum, int) and 0 < value <= maximum


def _fixed(shape: Shape, what: str) -> tuple[int, ...]:
    """Return a shape of integers. Raises `ShapeError` if a dimension changes from call to call."""
    for size in shape:
        if isinstance(size, str):
            raise ShapeError(f"{what} changes from call to call: {_text(shape)}")
    return _bounded(cast("tuple[int, ...]", shape))


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) > MAX_RANK or math.prod(shape) > MAX_VALUES:
        raise ShapeError(f"a value of {_text(shape)} is too large")
    return shape


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape[: MAX_RANK + 1]))}]"
