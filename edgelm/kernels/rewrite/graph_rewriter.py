"""Rewrites a bundle's graph for the kernels: packs quantized matrices into panels, replaces nodes by our operators.

A MatMulNBits becomes our MatMul operator, which also computes nodes around it: SwiGLU and RMSNorm before it, the
addition of the residual stream after it (see `fusion`). A table that is also the matrix of a product is read from the
same panels. Nodes that the kernels do not support are kept, nodes and tensors that nothing uses any more are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.graph.domain import DOMAIN
from edgelm.graph.onnx_model import (
    FLOAT,
    FLOAT16,
    INT64,
    UINT8,
    Model,
    Node,
    Tensor,
    encode_model,
    encode_node,
    encode_tensor,
    is_ort_operator,
    read_model,
)
from edgelm.kernels.abi import ALIGN, ATTENTION, NO_OFFSET, PANEL_COLUMNS, WeightFormat, is_operator
from edgelm.kernels.huge_pages import HugePageFile
from edgelm.kernels.rewrite.attention_lowering import lower_attention
from edgelm.kernels.rewrite.fusion import NORM, SKIP_NORM, Fusion, FusionPlan
from edgelm.kernels.rewrite.panel_layout import pack_codes, pack_scales, pad_bias
from edgelm.kernels.rewrite.split_codes import SplitCodeMatcher

GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"

_DTYPES: Final[dict[int, np.dtype[Any]]] = {
    FLOAT: np.dtype("<f4"),
    UINT8: np.dtype("u1"),
    INT64: np.dtype("<i8"),
    FLOAT16: np.dtype("<f2"),
}
_PANELS_AT_ONCE: Final = 64
"""Panels that are packed at once, which bounds the memory for packing."""
_MOVING: Final = frozenset({"Cast", "Gather", "GatherBlockQuantized", "Reshape", "Slice", "Split"})
_ROW_BY_ROW: Final = _MOVING | {"Add", "FastGelu", "Gelu", "Mul", "QuickGelu", "Tanh", NORM, SKIP_NORM}
"""Operators of onnxruntime that compute each row, or each number, independently."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A quantized matrix of K rows and N columns; scales [N, blocks] are the tensor `scales_name`.

    With 5 and 6 bits `codes` are the low 4 bits of each weight and `high` the bits above.
    """

    fmt: WeightFormat
    k: int
    columns: int
    codes: Tensor
    high: Tensor | None
    scales_name: str
    scales: NDArray[np.floating[Any]]
    bias: Tensor | None

    @property
    def width(self) -> int:
        """K rounded up to whole blocks."""
        return int(self.scales.shape[1]) * self.fmt.block_size


def rewrite_graph(model: bytes, data: Path, folder: Path) -> list[WeightFormat]:
    """Write a graph and its data for the kernels into a folder; return the formats that it needs.

    model: an encoded ONNX model whose weights lie in the file `data`. If there are no kernels for any of its matrices,
    returns no formats and writes nothing. Raises `ValueError` if it is not an ONNX model, and `OSError` if a file
    cannot be read or written.
    """
    whole = read_model(model)
    if not any(map(_is_product, whole.nodes)):
        return []
    with HugePageFile(folder / DATA) as file:
        rewriter = _GraphRewriter(whole, data, file)
        nodes, tensors = rewriter.result()
    if not rewriter.formats:
        (folder / DATA).unlink()
        return []
    (folder / GRAPH).write_bytes(encode_model(whole, nodes, tensors, DOMAIN))
    return sorted(rewriter.formats)


def is_row_wise(model: bytes) -> bool:
    """Return whether every node of a model computes a token independently of the other tokens in the pass.

    Products and attention of onnxruntime do not: they may add up in another order if there are more rows.
    """
    return all(
        (node.domain == DOMAIN and (node.op_type == ATTENTION or is_operator(node.op_type)))
        or is_ort_operator(node, *_ROW_BY_ROW)
        for node in read_model(model).nodes
    )


def _is_product(node: Node) -> bool:
    """Return whether the kernels may support a node as a product, judging by the node alone."""
    zero_points_or_groups = any(node.inputs[3:5])
    return (
        is_ort_operator(node, "MatMulNBits")
        and node.attributes.get("accuracy_level") == 4
        and not zero_points_or_groups
    )


class _GraphRewriter:
    """One pass over a graph."""

    def __init__(self, model: Model, data: Path, file: HugePageFile) -> None:
        self.formats: set[WeightFormat] = set()
        self._model = model
        self._tensors = model.tensors
        self._data = np.memmap(data, np.uint8, "r") if data.exists() and data.stat().st_size else np.zeros(0, np.uint8)
        self._file = file
        self._producers = {output: node for node in model.nodes for output in node.outputs if output}
        self._split_codes = SplitCodeMatcher(model.tensors, self._producers, self._array)
        found = {node.outputs[0]: self._matrix_of(node) for node in model.nodes if _is_product(node)}
        self._matrices = {output: matrix for output, matrix in found.items() if matrix is not None}
        self._fusions = FusionPlan(model, self._producers, lambda node: node.outputs[0] in self._matrices)
        self._new_tensors: dict[str, bytes] = {}
        """Encoded tensors of the new graph, by name."""
        self._offsets: dict[str, int] = {}
        """Offsets in the data file of what the kernels read, by name."""

    def result(self) -> tuple[list[bytes], list[bytes]]:
        """Return the encoded nodes and tensors of the new graph."""
        nodes: list[bytes] = []
        needed = set(self._model.outputs)
        for node in reversed(self._model.nodes):
            fusion = self._fusions.fusion_of(node)
            if fusion is None or not needed.intersection((*node.outputs, fusion.output)):
                continue
            matrix, table = self._matrices.get(node.outputs[0]), self._table_of(node)
            if matrix is not None:
                nodes.append(self._encode_matmul(node, fusion, matrix))
                needed.update(fusion.inputs)
            elif table is not None:
                nodes.append(self._encode_gather(node, table))
                needed.add(node.inputs[1])
            elif self._cast_source(node.outputs[0]) is None:
                encoded, inputs = lower_attention(self._model, node) or (node.encoded, node.inputs)
                nodes.append(encoded)
                needed.update(inputs)
        for name in sorted(needed):
            source = self._cast_source(name)
            if source is not None:  # a Cast node would copy the tensor into private memory at each start
                self._add_tensor(name, source.shape, FLOAT, [self._array(source).astype(np.float32)])
            elif name in self._tensors:
                self._keep_tensor(self._tensors[name])
        return nodes[::-1], list(self._new_tensors.values())

    def _matrix_of(self, node: Node) -> _Matrix | None:
        """Return the matrix of a product; None if there are no kernels for it."""
        _, codes_name, scales_name, _, _, bias_name = (*node.inputs, "", "", "")[:6]
        bits, block, columns, size = (int(node.attributes[name]) for name in ("bits", "block_size", "N", "K"))
        shape = columns, -(-size // block), block
        codes, high = self._tensors.get(codes_name), None
        if codes is None and bits == 8:
            parts = self._split_codes.match_parts(codes_name, shape)
            if parts is not None:
                bits, codes, high = parts
        fmt = WeightFormat(bits, block)
        scales = self._scales_of(scales_name)
        bias = self._tensors.get(bias_name)
        if codes is None or scales is None or (bias_name and bias is None) or not fmt.has_kernels:
            return None
        low_bits = 4 if fmt.high_bits else bits
        if codes.dtype != UINT8 or math.prod(codes.shape) != math.prod(shape) * low_bits // 8:
            return None
        if bias is not None and (bias.dtype != FLOAT or math.prod(bias.shape) != columns):
            return None
        values = self._in_float16(scales, shape[:2])
        return None if values is None else _Matrix(fmt, size, columns, codes, high, scales.name, values, bias)

    def _scales_of(self, name: str) -> Tensor | None:
        """Return the tensor of scales: float32, or float16 that is cast to float32; None if it is neither."""
        tensor = self._tensors.get(name)
        return tensor if tensor is not None and tensor.dtype == FLOAT else self._cast_source(name)

    def _in_float16(self, scales: Tensor, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """Return the scales of a matrix; None if their number is wrong or float16 does not represent them exactly."""
        if math.prod(scales.shape) != math.prod(shape):
            return None
        values = self._array(scales).reshape(shape)
        fits = scales.dtype == FLOAT16 or np.array_equal(values, values.astype(np.float16))
        return values if fits else None

    def _table_of(self, node: Node) -> _Matrix | None:
        """Return the table of a GatherBlockQuantized; None for other nodes and for tables without kernels."""
        if not is_ort_operator(node, "GatherBlockQuantized") or len(node.inputs) != 3:
            return None
        table, indices, scales_name = node.inputs
        given = self._model.inputs.get(indices)
        scales = self._scales_of(scales_name)
        if given is None or given.dtype != INT64 or scales is None:
            return None
        if node.attributes.get("gather_axis", 0) != 0 or node.attributes.get("quantize_axis", 1) != 1:
            return None
        for matrix in self._matrices.values():
            read_bits = 8 if matrix.high else matrix.fmt.bits
            is_same_format = node.attributes.get("bits", 4) == read_bits
            is_same_format = is_same_format and node.attributes.get("block_size", 128) == matrix.fmt.block_size
            if is_same_format and scales.name == matrix.scales_name:
                return matrix if self._is_table(table, matrix) else None
        return self._split_table(table, int(node.attributes.get("block_size", 128)), scales)

    def _split_table(self, name: str, block: int, scales: Tensor) -> _Matrix | None:
        """Return a table of 5 or 6 bits that no product reads; onnxruntime would expand its codes in every run."""
        reshape = self._producers.get(name)
        shape = self._split_codes.constant(reshape.inputs[1]) if reshape and reshape.op_type == "Reshape" else None
        if reshape is None or shape is None or len(shape) != 2 or shape[1] % block:
            return None
        blocks = shape[1] // block
        parts = self._split_codes.match_parts(reshape.inputs[0], (shape[0], blocks, block))
        values = self._in_float16(scales, (shape[0], blocks))
        if parts is None or values is None or not WeightFormat(parts[0], block).has_kernels:
            return None
        bits, codes, high = parts
        return _Matrix(WeightFormat(bits, block), shape[1], shape[0], codes, high, scales.name, values, None)

    def _is_table(self, name: str, matrix: _Matrix) -> bool:
        """Return whether a value holds the codes of a matrix, as a table: the same bytes, or the same split codes."""
        shape, fmt = [matrix.columns, matrix.width], matrix.fmt
        tensor = self._tensors.get(name)
        if tensor is not None:
            codes = matrix.codes
            same = tensor.name == codes.name or (
                tensor.external_range is not None and tensor.external_range == codes.external_range
            )
            return same and not matrix.high and [*tensor.shape] == [shape[0], shape[1] * fmt.bits // 8]
        reshape = self._producers.get(name)
        if reshape is None or reshape.op_type != "Reshape" or self._split_codes.constant(reshape.inputs[1]) != shape:
            return False
        blocks = matrix.width // fmt.block_size
        found = self._split_codes.match_parts(reshape.inputs[0], (matrix.columns, blocks, fmt.block_size))
        return found == (fmt.bits, matrix.codes, matrix.high)

    def _encode_gather(self, node: Node, matrix: _Matrix) -> bytes:
        """Return our Gather node for a table."""
        attributes = {"K": matrix.width, "N": matrix.columns, **self._write_panels(matrix)}
        name = matrix.fmt.gather_op_type
        return encode_node(node.outputs[0], name, DOMAIN, [node.inputs[1]], node.outputs, attributes)

    def _write_panels(self, matrix: _Matrix) -> dict[str, int]:
        """Write a matrix in panels, once; return the offsets of its weights and scales, as attributes."""
        self.formats.add(matrix.fmt)
        shape = *matrix.scales.shape, -1
        codes = self._array(matrix.codes).reshape(shape)
        high = None if matrix.high is None else self._array(matrix.high).reshape(shape)
        step = PANEL_COLUMNS * _PANELS_AT_ONCE
        parts = (
            pack_codes(codes[at : at + step], matrix.fmt.bits, None if high is None else high[at : at + step])
            for at in range(0, matrix.columns, step)
        )
        scales = (pack_scales(values) for values in [matrix.scales])
        return {"WEIGHTS": self._write(matrix.codes.name, parts), "SCALES": self._write(matrix.scales_name, scales)}

    def _encode_matmul(self, node: Node, fusion: Fusion, matrix: _Matrix) -> bytes:
        """Return our MatMul node for a product and the nodes that are fused into it."""
        bias = matrix.bias
        attributes = {
            "K": matrix.k,
            "N": matrix.columns,
            "GATED": int(fusion.gated),
            **self._write_panels(matrix),
            "BIAS": NO_OFFSET,
            "NORM": NO_OFFSET,
            "EPSILON": 0,
        }
        if bias is not None:
            attributes["BIAS"] = self._write(bias.name, [pad_bias(self._array(bias).reshape(-1))])
        if fusion.norm is not None:
            weight = np.zeros(matrix.width, np.float32)
            weight[: matrix.k] = self._array(self._tensors[fusion.norm])
            attributes["NORM"] = self._write(f"{fusion.norm}.{len(weight)}", [weight])
            attributes["EPSILON"] = int(np.float32(fusion.epsilon).view(np.int32))
        outputs = [fusion.output, f"{fusion.output}.scratch"]
        return encode_node(node.outputs[0], matrix.fmt.matmul_op_type, DOMAIN, fusion.inputs, outputs, attributes)

    def _cast_source(self, name: str) -> Tensor | None:
        """Return the float16 tensor that is cast to a value; None if the value is computed in another way."""
        cast = self._producers.get(name)
        if cast is None or cast.op_type != "Cast" or cast.attributes.get("to") != FLOAT:
            return None
        source = self._tensors.get(cast.inputs[0])
        return source if source is not None and source.dtype == FLOAT16 else None

    def _array(self, tensor: Tensor) -> NDArray[Any]:
        """Return a view of a tensor's values."""
        source = tensor.raw if tensor.external_range is None else self._data[tensor.external_range]
        count = int(np.prod(tensor.shape, dtype=np.int64))
        return np.frombuffer(source, _DTYPES[tensor.dtype], count).reshape(tensor.shape)

    def _keep_tensor(self, tensor: Tensor) -> None:
        """Keep a tensor; copy its values to the new data file if they were in the old one."""
        if tensor.external_range is None:
            self._new_tensors[tensor.name] = tensor.encoded
        else:
            self._add_tensor(tensor.name, tensor.shape, tensor.dtype, [self._data[tensor.external_range]])

    def _add_tensor(self, name: str, shape: Sequence[int], dtype: int, parts: Iterable[NDArray[Any]]) -> None:
        """Add a tensor whose values, the concatenated parts, are appended to the data file."""
        start = self._append(parts)
        self._new_tensors[name] = encode_tensor(name, shape, dtype, DATA, start, self._file.offset - start)

    def _write(self, name: str, parts: Iterable[NDArray[Any]]) -> int:
        """Append the concatenated parts to the data file, once for each name; return their offset."""
        if name not in self._offsets:
            self._offsets[name] = self._append(parts)
        return self._offsets[name]

    def _append(self, parts: Iterable[NDArray[Any]]) -> int:
        """Append the concatenated parts to the data file at an aligned offset, which is returned."""
        self._file.write(bytes(-self._file.offset % ALIGN))
        start = self._file.offset
        for part in parts:
            self._file.write(np.ascontiguousarray(part).data)
        return start
