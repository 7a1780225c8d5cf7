"""A bundle's graph for the kernels: quantized matrices in panels, MatMulNBits replaced by operators of our own.

What the kernels do not know stays as it is, and what nothing uses any more is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.native.formats import BLOCKS, COLUMNS, DOMAIN, Format
from edgelm.native.onnx_model import (
    FLOAT,
    FLOAT16,
    UINT8,
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


def write_panels(model: bytes, data: Path, folder: Path) -> list[Format]:
    """Write a graph and its data for the kernels into a folder; return the formats that it needs.

    model: an ONNX model whose weights lie in the file `data`. Where no matrix is of a format that there are kernels
    for, no format is returned and nothing is written. Raises `ValueError` for what is no such model and `OSError`
    where a file cannot be read or written.
    """
    whole = read_model(model)
    if not any(_form(node) for node in whole.nodes):
        return []
    with (folder / DATA).open("wb") as file:
        rewriting = _Rewriting(whole.nodes, whole.tensors.values(), data, file)
        nodes, tensors = rewriting.result(whole.outputs)
    if not rewriting.formats:
        (folder / DATA).unlink()
        return []
    (folder / GRAPH).write_bytes(encode_model(whole, nodes, tensors, DOMAIN))
    return sorted(rewriting.formats)


def _form(node: Node) -> Format | None:
    """Return the format of a node's matrix, if there are kernels for it."""
    if node.operator != "MatMulNBits" or node.attributes.get("accuracy_level") != 4:
        return None
    form = Format(int(node.attributes["bits"]), int(node.attributes["block_size"]))
    zero_points_or_groups = any(node.inputs[3:5])
    return form if form.bits in (4, 8) and form.block in BLOCKS and not zero_points_or_groups else None


class _Rewriting:
    """One pass over a graph."""

    def __init__(self, nodes: Sequence[Node], tensors: Iterable[Tensor], data: Path, file: Any) -> None:
        self.formats: set[Format] = set()
        self._nodes = nodes
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._data = np.memmap(data, np.uint8, "r") if data.exists() and data.stat().st_size else np.zeros(0, np.uint8)
        self._file = file
        self._makers = {output: node for node in nodes for output in node.outputs if output}
        self._made: dict[str, bytes] = {}
        """New tensors by their names."""

    def result(self, outputs: Iterable[str]) -> tuple[list[bytes], list[bytes]]:
        """Return the new nodes and tensors."""
        kept: list[bytes] = []
        wanted = set(outputs)
        for node in reversed(self._nodes):
            if not wanted.intersection(node.outputs):
                continue
            new = self._replaced(node)
            if new is not None:
                encoded, inputs = new
                kept.append(encoded)
                wanted.update(inputs)
            elif self._widened(node.outputs[0]) is None:
                kept.append(node.encoded)
                wanted.update(node.inputs)
        for name in sorted(wanted - self._made.keys()):
            source = self._widened(name)
            if source is not None:  # instead of a node that does so at each start, into private memory
                self._make(name, source.shape, FLOAT, [self._array(source).astype(np.float32)])
            elif name in self._tensors:
                self._keep(self._tensors[name])
        return kept[::-1], list(self._made.values())

    def _replaced(self, node: Node) -> tuple[bytes, list[str]] | None:
        """Return a node that computes the same from panels, and its inputs; None where there are no kernels for it."""
        form = _form(node)
        if form is None:
            return None
        x, codes_name, scales_name, _, _, bias_name = (*node.inputs, "", "", "")[:6]
        codes = self._tensors.get(codes_name)
        scales = self._widened(scales_name) or self._tensors.get(scales_name)
        bias = self._tensors.get(bias_name)
        columns, size = int(node.attributes["N"]), int(node.attributes["K"])
        if codes is None or scales is None or (bias_name and bias is None):
            return None
        blocks = -(-size // form.block)
        values = self._array(scales).reshape(columns, blocks)
        if scales.dtype != FLOAT16 and not np.array_equal(values, values.astype(np.float16)):
            return None
        gated = self._gated(x)
        inputs = [gated or x, f"{codes_name}.panels", f"{scales_name}.panels"]
        panels = -(-columns // COLUMNS)
        if inputs[1] not in self._made:
            matrix = self._array(codes).reshape(columns, blocks, form.block_bytes)
            step = COLUMNS * _PANELS_AT_ONCE
            parts = (packed_codes(matrix[at : at + step], form.bits) for at in range(0, columns, step))
            self._make(inputs[1], [panels, blocks, COLUMNS * form.block_bytes], UINT8, parts)
        if inputs[2] not in self._made:
            self._make(inputs[2], [panels, blocks, COLUMNS], FLOAT16, [packed_scales(values)])
        if bias is not None:
            inputs.append(f"{bias_name}.panels")
            self._make(inputs[3], [panels * COLUMNS], FLOAT, [packed_bias(self._array(bias).reshape(-1))])
        self.formats.add(form)
        outputs = [node.outputs[0], f"{node.outputs[0]}.scratch"]
        attributes = {"K": size, "N": columns, "GATED": int(gated is not None)}
        return encode_node(form.operator, DOMAIN, inputs, outputs, attributes), inputs

    def _gated(self, name: str) -> str | None:
        """Return what a value is the SwiGLU of: gates and values that were split apart; None where it is none."""
        product = self._makers.get(name)
        if product is None or product.operator != "Mul":
            return None
        gate = self._makers.get(product.inputs[0])
        if gate is None or gate.operator != "QuickGelu" or gate.attributes.get("alpha") != 1.0:
            return None
        split = self._makers.get(gate.inputs[0])
        if split is None or split.operator != "Split" or split.attributes.get("axis") != -1:
            return None
        return split.inputs[0] if split.outputs == (gate.inputs[0], product.inputs[1]) else None

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
        self._file.write(bytes(-self._file.tell() % _ALIGN))
        start = self._file.tell()
        for part in parts:
            self._file.write(np.ascontiguousarray(part).data)
        self._made[name] = encode_tensor(name, shape, dtype, DATA, start, self._file.tell() - start)
