"""A bundle's graph for the kernels: quantized matrices in panels, MatMulNBits replaced by operators of our own.

A table of rows that is a product's matrix as well is read from the same panels. The operators take over what stands
around a product: SwiGLU and RMSNorm before it, the addition of the residual stream behind it (see `folding`). What the
kernels do not know stays as it is, and what nothing uses any more is dropped.
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
"""Panels that are packed in one go, which bounds the memory that takes."""
_MOVING: Final = frozenset({"Cast", "Gather", "GatherBlockQuantized", "Reshape", "Slice", "Split"})
_ROW_BY_ROW: Final = _MOVING | {"Add", "FastGelu", "Gelu", "Mul", "QuickGelu", "Tanh", NORM, SKIP_NORM}
"""Operators of onnxruntime that compute each row, or each number, by itself."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A quantized matrix: `size` rows, scales [columns, blocks], which are the tensor `scales_name`.

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
        """The rows with those that fill up the last block."""
        return int(self.scales.shape[1]) * self.fmt.block_size


def rewrite_graph(model: bytes, data: Path, folder: Path) -> list[WeightFormat]:
    """Write a graph and its data for the kernels into a folder; return the formats that it needs.

    model: an ONNX model whose weights lie in the file `data`. Where no matrix is of a format that there are kernels
    for, no format is returned and nothing is written. Raises `ValueError` for what is no such model and `OSError`
    where a file cannot be read or written.
    """
    whole = read_model(model)
    if not any(map(_is_product, whole.nodes)):
        return []
    with HugePageFile(folder / DATA) as file:
        rewriting = _GraphRewriter(whole, data, file)
        nodes, tensors = rewriting.result()
    if not rewriting.formats:
        (folder / DATA).unlink()
        return []
    (folder / GRAPH).write_bytes(encode_model(whole, nodes, tensors, DOMAIN))
    return sorted(rewriting.formats)


def is_row_wise(model: bytes) -> bool:
    """Tell whether every node of a model computes a token's numbers from that token and the memory alone.

    Products and attention of onnxruntime's may add up in another order when more rows are computed together.
    """
    return all(
        (node.domain == DOMAIN and (node.op_type == ATTENTION or is_operator(node.op_type)))
        or is_ort_operator(node, *_ROW_BY_ROW)
        for node in read_model(model).nodes
    )


def _is_product(node: Node) -> bool:
    """Whether a node may be a product that the kernels compute, as far as it says itself."""
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
        self._joining = SplitCodeMatcher(model.tensors, self._producers, self._array)
        found = {node.outputs[0]: self._matrix_of(node) for node in model.nodes if _is_product(node)}
        self._matrices = {output: matrix for output, matrix in found.items() if matrix is not None}
        self._folding = FusionPlan(model, self._producers, lambda node: node.outputs[0] in self._matrices)
        self._made: dict[str, bytes] = {}
        """New tensors by their names."""
        self._places: dict[str, int] = {}
        """Where in the file the kernels find what they use, by names."""

    def result(self) -> tuple[list[bytes], list[bytes]]:
        """Return the new nodes and tensors."""
        kept: list[bytes] = []
        wanted = set(self._model.outputs)
        for node in reversed(self._model.nodes):
            fusion = self._folding.of(node)
            if fusion is None or not wanted.intersection((*node.outputs, fusion.output)):
                continue
            matrix, table = self._matrices.get(node.outputs[0]), self._table_of(node)
            if matrix is not None:
                kept.append(self._replaced(node, fusion, matrix))
                wanted.update(fusion.inputs)
            elif table is not None:
                kept.append(self._looked_up(node, table))
                wanted.add(node.inputs[1])
            elif self._cast_source(node.outputs[0]) is None:
                encoded, inputs = lower_attention(self._model, node) or (node.encoded, node.inputs)
                kept.append(encoded)
                wanted.update(inputs)
        for name in sorted(wanted):
            source = self._cast_source(name)
            if source is not None:  # instead of a node that does so at each start, into private memory
                self._make(name, source.shape, FLOAT, [self._array(source).astype(np.float32)])
            elif name in self._tensors:
                self._keep(self._tensors[name])
        return kept[::-1], list(self._made.values())

    def _matrix_of(self, node: Node) -> _Matrix | None:
        """Return the matrix of a product; None where there are no kernels for it."""
        _, codes_name, scales_name, _, _, bias_name = (*node.inputs, "", "", "")[:6]
        bits, block, columns, size = (int(node.attributes[name]) for name in ("bits", "block_size", "N", "K"))
        shape = columns, -(-size // block), block
        codes, high = self._tensors.get(codes_name), None
        if codes is None and bits == 8:
            joined = self._joining.match_parts(codes_name, shape)
            if joined is not None:
                bits, codes, high = joined
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
        """Return the tensor of scales in float32, or in float16 that a node widens; None for all others."""
        tensor = self._tensors.get(name)
        return tensor if tensor is not None and tensor.dtype == FLOAT else self._cast_source(name)

    def _in_float16(self, scales: Tensor, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """Return the scales of a matrix; None where they have another number or do not fit into float16."""
        if math.prod(scales.shape) != math.prod(shape):
            return None
        values = self._array(scales).reshape(shape)
        fits = scales.dtype == FLOAT16 or np.array_equal(values, values.astype(np.float16))
        return values if fits else None

    def _table_of(self, node: Node) -> _Matrix | None:
        """Return the matrix that a node looks rows up in; None where it stays onnxruntime's or does something else."""
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
            alike = node.attributes.get("bits", 4) == read_bits
            alike = alike and node.attributes.get("block_size", 128) == matrix.fmt.block_size
            if alike and scales.name == matrix.scales_name:
                return matrix if self._is_table(table, matrix) else None
        return self._split_table(table, int(node.attributes.get("block_size", 128)), scales)

    def _split_table(self, name: str, block: int, scales: Tensor) -> _Matrix | None:
        """Return a table of 5 or 6 bits that no product reads; onnxruntime would join its codes in every run."""
        reshape = self._producers.get(name)
        shape = self._joining.constant(reshape.inputs[1]) if reshape and reshape.op_type == "Reshape" else None
        if reshape is None or shape is None or len(shape) != 2 or shape[1] % block:
            return None
        blocks = shape[1] // block
        parts = self._joining.match_parts(reshape.inputs[0], (shape[0], blocks, block))
        values = self._in_float16(scales, (shape[0], blocks))
        if parts is None or values is None or not WeightFormat(parts[0], block).has_kernels:
            return None
        bits, codes, high = parts
        return _Matrix(WeightFormat(bits, block), shape[1], shape[0], codes, high, scales.name, values, None)

    def _is_table(self, name: str, matrix: _Matrix) -> bool:
        """Whether a value is the codes of a matrix in rows: the same bytes under another shape, or the same nodes."""
        shape, fmt = [matrix.columns, matrix.width], matrix.fmt
        tensor = self._tensors.get(name)
        if tensor is not None:
            codes = matrix.codes
            same = tensor.name == codes.name or (
                tensor.external_range is not None and tensor.external_range == codes.external_range
            )
            return same and not matrix.high and [*tensor.shape] == [shape[0], shape[1] * fmt.bits // 8]
        reshape = self._producers.get(name)
        if reshape is None or reshape.op_type != "Reshape" or self._joining.constant(reshape.inputs[1]) != shape:
            return False
        blocks = matrix.width // fmt.block_size
        found = self._joining.match_parts(reshape.inputs[0], (matrix.columns, blocks, fmt.block_size))
        return found == (fmt.bits, matrix.codes, matrix.high)

    def _looked_up(self, node: Node, matrix: _Matrix) -> bytes:
        """Return a node that looks rows up in panels."""
        attributes = {"K": matrix.width, "N": matrix.columns, **self._panels(matrix)}
        name = matrix.fmt.gather_op_type
        return encode_node(node.outputs[0], name, DOMAIN, [node.inputs[1]], node.outputs, attributes)

    def _panels(self, matrix: _Matrix) -> dict[str, int]:
        """Return where the file has a matrix in panels."""
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

    def _replaced(self, node: Node, fusion: Fusion, matrix: _Matrix) -> bytes:
        """Return a node that computes the same from panels."""
        bias = matrix.bias
        attributes = {
            "K": matrix.k,
            "N": matrix.columns,
            "GATED": int(fusion.gated),
            **self._panels(matrix),
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
        """Return the tensor in float16 that a value in float32 is cast from, if it is."""
        cast = self._producers.get(name)
        if cast is None or cast.op_type != "Cast" or cast.attributes.get("to") != FLOAT:
            return None
        source = self._tensors.get(cast.inputs[0])
        return source if source is not None and source.dtype == FLOAT16 else None

    def _array(self, tensor: Tensor) -> NDArray[Any]:
        """Return a tensor's values without copying them."""
        source = tensor.raw if tensor.external_range is None else self._data[tensor.external_range]
        count = int(np.prod(tensor.shape, dtype=np.int64))
        return np.frombuffer(source, _DTYPES[tensor.dtype], count).reshape(tensor.shape)

    def _keep(self, tensor: Tensor) -> None:
        """Keep a tensor as it was, with its values in the new file if they were in the old one."""
        if tensor.external_range is None:
            self._made[tensor.name] = tensor.encoded
        else:
            self._make(tensor.name, tensor.shape, tensor.dtype, [self._data[tensor.external_range]])

    def _make(self, name: str, shape: Sequence[int], dtype: int, parts: Iterable[NDArray[Any]]) -> None:
        """Append a tensor to the data file, given as arrays one behind the other."""
        start = self._append(parts)
        self._made[name] = encode_tensor(name, shape, dtype, DATA, start, self._file.offset - start)

    def _write(self, name: str, parts: Iterable[NDArray[Any]]) -> int:
        """Return where the data file has something for the kernels, which is appended where it has not."""
        if name not in self._places:
            self._places[name] = self._append(parts)
        return self._places[name]

    def _append(self, parts: Iterable[NDArray[Any]]) -> int:
        self._file.write(bytes(-self._file.offset % ALIGN))
        start = self._file.offset
        for part in parts:
            self._file.write(np.ascontiguousarray(part).data)
        return start
