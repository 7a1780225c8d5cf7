"""A bundle's graph for the kernels: quantized matrices in panels, MatMulNBits replaced by operators of our own.

The operators take over what stands around a product: SwiGLU and RMSNorm before it, the addition of the residual stream
behind it (see `folding`). What the kernels do not know stays as it is, and what nothing uses any more is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.native.attention_nodes import attention_of
from edgelm.native.folding import NORM, SKIP_NORM, Fold, Folding
from edgelm.native.formats import ATTENTION, BLOCKS, COLUMNS, DOMAIN, Format
from edgelm.native.mapping import PagedFile
from edgelm.native.onnx_model import (
    FLOAT,
    FLOAT16,
    UINT8,
    Model,
    Node,
    Tensor,
    encode_model,
    encode_node,
    encode_tensor,
    read_model,
)
from edgelm.native.packing import packed_bias, packed_codes, packed_scales

GRAPH: Final = "model.onnx"
DATA: Final = "model.onnx.data"

_DTYPES: Final[dict[int, np.dtype[Any]]] = {FLOAT: np.dtype("<f4"), UINT8: np.dtype("u1"), FLOAT16: np.dtype("<f2")}
_ALIGN: Final = 64
"""Tensors begin at multiples of this: a line of the caches."""
_PANELS_AT_ONCE: Final = 64
"""Panels that are packed in one go, which bounds the memory that takes."""
_NOWHERE: Final = -1
_MOVING: Final = frozenset({"Cast", "Gather", "GatherBlockQuantized", "Reshape", "Slice", "Split"})
_ROW_BY_ROW: Final = _MOVING | {"Add", "FastGelu", "Gelu", "Mul", "QuickGelu", "Tanh", NORM, SKIP_NORM}
"""Operators of onnxruntime that compute each row, or each number, by itself."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A quantized matrix: `size` rows, scales [columns, blocks], which are the tensor `scales_name`."""

    form: Format
    size: int
    columns: int
    codes: Tensor
    scales_name: str
    scales: NDArray[np.floating[Any]]
    bias: Tensor | None


def write_panels(model: bytes, data: Path, folder: Path) -> list[Format]:
    """Write a graph and its data for the kernels into a folder; return the formats that it needs.

    model: an ONNX model whose weights lie in the file `data`. Where no matrix is of a format that there are kernels
    for, no format is returned and nothing is written. Raises `ValueError` for what is no such model and `OSError`
    where a file cannot be read or written.
    """
    whole = read_model(model)
    if not any(_form(node) for node in whole.nodes):
        return []
    with PagedFile(folder / DATA) as file:
        rewriting = _Rewriting(whole, data, file)
        nodes, tensors = rewriting.result()
    if not rewriting.formats:
        (folder / DATA).unlink()
        return []
    (folder / GRAPH).write_bytes(encode_model(whole, nodes, tensors, DOMAIN))
    return sorted(rewriting.formats)


def computes_row_by_row(model: bytes) -> bool:
    """Tell whether every node of a model computes a token's numbers from that token and the memory alone.

    Products and attention of onnxruntime's may add up in another order when more rows are computed together.
    """
    return all(
        node.operator in _ROW_BY_ROW or node.operator == ATTENTION or Format.of_operator(node.operator) is not None
        for node in read_model(model).nodes
    )


def _form(node: Node) -> Format | None:
    """Return the format of a node's matrix, if there are kernels for it."""
    if node.operator != "MatMulNBits" or node.attributes.get("accuracy_level") != 4:
        return None
    form = Format(int(node.attributes["bits"]), int(node.attributes["block_size"]))
    zero_points_or_groups = any(node.inputs[3:5])
    return form if form.bits in (4, 8) and form.block in BLOCKS and not zero_points_or_groups else None


class _Rewriting:
    """One pass over a graph."""

    def __init__(self, model: Model, data: Path, file: PagedFile) -> None:
        self.formats: set[Format] = set()
        self._model = model
        self._tensors = model.tensors
        self._data = np.memmap(data, np.uint8, "r") if data.exists() and data.stat().st_size else np.zeros(0, np.uint8)
        self._file = file
        self._makers = {output: node for node in model.nodes for output in node.outputs if output}
        self._folding = Folding(model, self._makers, lambda node: self._matrix(node) is not None)
        self._made: dict[str, bytes] = {}
        """New tensors by their names."""
        self._places: dict[str, int] = {}
        """Where in the file the kernels find what they use, by names."""

    def result(self) -> tuple[list[bytes], list[bytes]]:
        """Return the new nodes and tensors."""
        kept: list[bytes] = []
        wanted = set(self._model.outputs)
        for node in reversed(self._model.nodes):
            fold = self._folding.of(node)
            if fold is None or not wanted.intersection((*node.outputs, fold.output)):
                continue
            matrix = self._matrix(node)
            if matrix is not None:
                kept.append(self._replaced(node, fold, matrix))
                wanted.update(fold.inputs)
            elif self._widened(node.outputs[0]) is None:
                encoded, inputs = attention_of(self._model, node) or (node.encoded, node.inputs)
                kept.append(encoded)
                wanted.update(inputs)
        for name in sorted(wanted):
            source = self._widened(name)
            if source is not None:  # instead of a node that does so at each start, into private memory
                self._make(name, source.shape, FLOAT, [self._array(source).astype(np.float32)])
            elif name in self._tensors:
                self._keep(self._tensors[name])
        return kept[::-1], list(self._made.values())

    def _matrix(self, node: Node) -> _Matrix | None:
        """Return the matrix of a product; None where there are no kernels for it."""
        form = _form(node)
        if form is None:
            return None
        _, codes_name, scales_name, _, _, bias_name = (*node.inputs, "", "", "")[:6]
        codes = self._tensors.get(codes_name)
        scales = self._widened(scales_name) or self._tensors.get(scales_name)
        bias = self._tensors.get(bias_name)
        columns, size = int(node.attributes["N"]), int(node.attributes["K"])
        if codes is None or scales is None or (bias_name and bias is None):
            return None
        values = self._array(scales).reshape(columns, -(-size // form.block))
        if scales.dtype != FLOAT16 and not np.array_equal(values, values.astype(np.float16)):
            return None
        return _Matrix(form, size, columns, codes, scales.name, values, bias)

    def _replaced(self, node: Node, fold: Fold, matrix: _Matrix) -> bytes:
        """Return a node that computes the same from panels."""
        form, codes, bias = matrix.form, matrix.codes, matrix.bias
        blocks = -(-matrix.size // form.block)
        stored = self._array(codes).reshape(matrix.columns, blocks, form.block_bytes)
        step = COLUMNS * _PANELS_AT_ONCE
        parts = (packed_codes(stored[at : at + step], form.bits) for at in range(0, matrix.columns, step))
        attributes = {
            "K": matrix.size,
            "N": matrix.columns,
            "GATED": int(fold.gated),
            "WEIGHTS": self._write(codes.name, parts),
            "SCALES": self._write(matrix.scales_name, [packed_scales(matrix.scales)]),
            "BIAS": _NOWHERE,
            "NORM": _NOWHERE,
            "EPSILON": 0,
        }
        if bias is not None:
            attributes["BIAS"] = self._write(bias.name, [packed_bias(self._array(bias).reshape(-1))])
        if fold.norm is not None:
            weight = np.zeros(blocks * form.block, np.float32)
            weight[: matrix.size] = self._array(self._tensors[fold.norm])
            attributes["NORM"] = self._write(f"{fold.norm}.{len(weight)}", [weight])
            attributes["EPSILON"] = int(np.float32(fold.epsilon).view(np.int32))
        self.formats.add(form)
        outputs = [fold.output, f"{fold.output}.scratch"]
        return encode_node(node.outputs[0], form.operator, DOMAIN, fold.inputs, outputs, attributes)

    def _widened(self, name: str) -> Tensor | None:
        """Return the tensor in float16 that a value in float32 is cast from, if it is."""
        cast = self._makers.get(name)
        if cast is None or cast.operator != "Cast" or cast.attributes.get("to") != FLOAT:
            return None
        source = self._tensors.get(cast.inputs[0])
        return source if source is not None and source.dtype == FLOAT16 else None

    def _array(self, tensor: Tensor) -> NDArray[Any]:
        """Return a tensor's values without copying them."""
        source = tensor.raw if tensor.place is None else self._data[tensor.place]
        count = int(np.prod(tensor.shape, dtype=np.int64))
        return np.frombuffer(source, _DTYPES[tensor.dtype], count).reshape(tensor.shape)

    def _keep(self, tensor: Tensor) -> None:
        """Keep a tensor as it was, with its values in the new file if they were in the old one."""
        if tensor.place is None:
            self._made[tensor.name] = tensor.encoded
        else:
            self._make(tensor.name, tensor.shape, tensor.dtype, [self._data[tensor.place]])

    def _make(self, name: str, shape: Sequence[int], dtype: int, parts: Iterable[NDArray[Any]]) -> None:
        """Append a tensor to the data file, given as arrays one behind the other."""
        start = self._append(parts)
        self._made[name] = encode_tensor(name, shape, dtype, DATA, start, self._file.place - start)

    def _write(self, name: str, parts: Iterable[NDArray[Any]]) -> int:
        """Return where the data file has something for the kernels, which is appended where it has not."""
        if name not in self._places:
            self._places[name] = self._append(parts)
        return self._places[name]

    def _append(self, parts: Iterable[NDArray[Any]]) -> int:
        self._file.write(bytes(-self._file.place % _ALIGN))
        start = self._file.place
        for part in parts:
            self._file.write(np.ascontiguousarray(part).data)
        return start
