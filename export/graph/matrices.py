"""Weight matrices in a graph: how each is stored, and the nodes that multiply by it or look rows up in it.

Scales are stored as float16 where that loses nothing that matters, and turned into float32 once, when the graph is
loaded: half the bytes on disk for the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import Matrix

from ..quantize.pack import Packed
from ..quantize.spec import Spec
from ..rows import Rows
from .initializers import Initializers
from .nodes import MICROSOFT, Nodes

FLOAT: Final = 1
"""TensorProto's number for float32."""

Array = NDArray[np.float32]


def store_float(initializers: Initializers, name: str, rows: Rows, *, table: bool) -> Matrix:
    """Write a matrix as float32: [N, K] for a `table` of rows, else transposed, as MatMul reads it."""
    whole = rows.whole()
    initializers.add(_weight(name), whole if table else np.ascontiguousarray(whole.T))
    return Matrix(name, *rows.shape, 32)


def store_packed(initializers: Initializers, name: str, packed: Packed, spec: Spec) -> Matrix:
    """Write a quantized matrix: codes, scales and, if it has them, zero points."""
    initializers.add(_codes(name), packed.data)
    narrow = packed.scales.dtype == np.float16
    initializers.add(_stored_scales(name) if narrow else _scales(name), packed.scales)
    if packed.zero_points is not None:
        initializers.add(_zero_points(name), packed.zero_points)
    return Matrix(
        name,
        packed.data.shape[0],
        packed.columns,
        packed.bits,
        packed.block_size,
        packed.zero_points is None,
        spec.accuracy_level,
        spec.method,
        16 if narrow else 32,
    )


def tensors_of(matrix: Matrix) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """Yield name, type and shape of the tensors that a matrix is stored in, in the order they are written."""
    rows, columns = matrix.rows, matrix.columns
    if matrix.block_size is None:
        yield _weight(matrix.name), np.dtype(np.float32), (columns, rows)
        return
    blocks = -(-columns // matrix.block_size)
    narrow = matrix.scale_bits == 16
    yield _codes(matrix.name), np.dtype(np.uint8), (rows, blocks, matrix.block_size * matrix.bits // 8)
    name = _stored_scales(matrix.name) if narrow else _scales(matrix.name)
    yield name, np.dtype(np.float16 if narrow else np.float32), (rows, blocks)
    if not matrix.symmetric:
        yield _zero_points(matrix.name), np.dtype(np.uint8), (rows, -(-blocks * matrix.bits // 8))


def multiply(nodes: Nodes, matrix: Matrix, value: str, bias: str | None, output: str) -> str:
    """Value [..., K] -> value @ matrix.T + bias, [..., N]; `bias` names a float32 [N]."""
    if matrix.bits == 32:
        product = output if bias is None else f"{output}.product"
        nodes.add("MatMul", [value, _weight(matrix.name)], product)
        return product if bias is None else nodes.add("Add", [product, bias], output)
    zero_points = "" if matrix.symmetric else _zero_points(matrix.name)
    inputs = [value, _codes(matrix.name), _read_scales(nodes, matrix), zero_points, "", bias or ""]
    while not inputs[-1]:
        inputs.pop()
    return nodes.add(
        "MatMulNBits",
        inputs,
        output,
        domain=MICROSOFT,
        K=matrix.columns,
        N=matrix.rows,
        bits=matrix.bits,
        block_size=matrix.block_size,
        accuracy_level=matrix.accuracy_level,
    )


def multiply_table(nodes: Nodes, matrix: Matrix, value: str, output: str) -> str:
    """Multiply by a matrix stored as a table of rows: value [R, K] -> [R, N]."""
    if matrix.bits == 32:
        return nodes.add("Gemm", [value, _weight(matrix.name)], output, transB=1)
    return multiply(nodes, matrix, value, None, output)


def look_up(nodes: Nodes, matrix: Matrix, indices: str, output: str) -> str:
    """Rows of a table: int64 [...] -> float32 [..., K]. The codes are those that `multiply` reads, stored once."""
    if matrix.bits == 32 or matrix.block_size is None:
        return nodes.add("Gather", [_weight(matrix.name), indices], output, axis=0)
    blocks = -(-matrix.columns // matrix.block_size)
    width = blocks * matrix.block_size
    table = f"{matrix.name}.rows"
    if table not in nodes.constants.tensors:
        nodes.constants.alias(table, _codes(matrix.name), (matrix.rows, width * matrix.bits // 8))
    inputs = [table, indices, _read_scales(nodes, matrix)]
    if not matrix.symmetric:
        inputs.append(_zero_points(matrix.name))
    looked_up = output if width == matrix.columns else f"{output}.padded"
    nodes.add(
        "GatherBlockQuantized",
        inputs,
        looked_up,
        domain=MICROSOFT,
        bits=matrix.bits,
        block_size=matrix.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if width == matrix.columns:
        return looked_up
    bounds = [nodes.integers(f"{output}.{name}", [at]) for name, at in (("from", 0), ("to", matrix.columns))]
    return nodes.add("Slice", [looked_up, *bounds, nodes.integers("last_axis", [-1])], output)


def _read_scales(nodes: Nodes, matrix: Matrix) -> str:
    """Return the name of a matrix's float32 scales, cast from float16 once where they are stored so."""
    name = _scales(matrix.name)
    if matrix.scale_bits == 16 and not nodes.has(name):
        nodes.add("Cast", [_stored_scales(matrix.name)], name, to=FLOAT)
    return name


def _weight(name: str) -> str:
    return f"{name}.weight"


def _codes(name: str) -> str:
    return f"{name}.codes"


def _scales(name: str) -> str:
    return f"{name}.scales"


def _stored_scales(name: str) -> str:
    return f"{name}.scales.float16"


def _zero_points(name: str) -> str:
    return f"{name}.zero_points"
