"""Weight matrices in a graph: how each is stored, and the nodes that multiply by it or look rows up in it.

Scales are stored as float16 where that loses nothing that matters, and turned into float32 once, when the graph is
loaded: half the bytes on disk for the same kernels. Codes of 5 and 6 bits are stored as their low halves and the bits
above, and joined to the 8-bit codes that onnxruntime's operators read, once as well: it folds these nodes of constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.manifest import Matrix

from ..checkpoint.matrix_reader import LazyMatrix
from ..quantize.pack import PackedMatrix
from ..quantize.spec import QuantSpec
from .initializers import FileInitializers
from .nodes import MICROSOFT_DOMAIN, GraphBuilder

FLOAT32_TYPE: Final = 1
"""TensorProto's number for float32."""

Array = NDArray[np.float32]


def store_float(initializers: FileInitializers, name: str, rows: LazyMatrix, *, table: bool) -> Matrix:
    """Write a matrix as float32: [N, K] for a `table` of rows, else transposed, as MatMul reads it."""
    whole = rows.whole()
    initializers.add(_weight(name), whole if table else np.ascontiguousarray(whole.T))
    return Matrix(name, *rows.shape, 32)


def store_packed(initializers: FileInitializers, name: str, packed: PackedMatrix, spec: QuantSpec) -> Matrix:
    """Write a quantized matrix: codes, scales and, if it has them, zero points."""
    initializers.add(_low_codes(name) if packed.high_bits is not None else _codes(name), packed.data)
    if packed.high_bits is not None:
        initializers.add(_high_codes(name), packed.high_bits)
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


def matrix_tensors(matrix: Matrix) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    """Yield name, type and shape of the tensors that a matrix is stored in, in the order they are written."""
    rows, columns = matrix.rows, matrix.columns
    if matrix.block_size is None:
        yield _weight(matrix.name), np.dtype(np.float32), (columns, rows)
        return
    blocks = -(-columns // matrix.block_size)
    narrow = matrix.scale_bits == 16
    if has_split_codes(matrix):
        yield _low_codes(matrix.name), np.dtype(np.uint8), (rows, blocks, matrix.block_size // 2)
        yield _high_codes(matrix.name), np.dtype(np.uint8), (rows, blocks, matrix.block_size * (matrix.bits - 4) // 8)
    else:
        yield _codes(matrix.name), np.dtype(np.uint8), (rows, blocks, matrix.block_size * matrix.bits // 8)
    name = _stored_scales(matrix.name) if narrow else _scales(matrix.name)
    yield name, np.dtype(np.float16 if narrow else np.float32), (rows, blocks)
    if not matrix.symmetric:
        yield _zero_points(matrix.name), np.dtype(np.uint8), (rows, -(-blocks * matrix.bits // 8))


def add_matmul(nodes: GraphBuilder, matrix: Matrix, value: str, bias: str | None, output: str) -> str:
    """Value [..., K] -> value @ matrix.T + bias, [..., N]; `bias` names a float32 [N]."""
    if matrix.bits == 32:
        product = output if bias is None else f"{output}.product"
        nodes.add("MatMul", [value, _weight(matrix.name)], product)
        return product if bias is None else nodes.add("Add", [product, bias], output)
    zero_points = "" if matrix.symmetric else _zero_points(matrix.name)
    inputs = [value, _read_codes(nodes, matrix), _read_scales(nodes, matrix), zero_points, "", bias or ""]
    while not inputs[-1]:
        inputs.pop()
    return nodes.add(
        "MatMulNBits",
        inputs,
        output,
        domain=MICROSOFT_DOMAIN,
        K=matrix.columns,
        N=matrix.rows,
        bits=_read_bits(matrix),
        block_size=matrix.block_size,
        accuracy_level=matrix.accuracy_level,
    )


def add_table_matmul(nodes: GraphBuilder, matrix: Matrix, value: str, output: str) -> str:
    """Multiply by a matrix stored as a table of rows: value [R, K] -> [R, N]."""
    if matrix.bits == 32:
        return nodes.add("Gemm", [value, _weight(matrix.name)], output, transB=1)
    return add_matmul(nodes, matrix, value, None, output)


def add_lookup(nodes: GraphBuilder, matrix: Matrix, indices: str, output: str) -> str:
    """Rows of a table: int64 [...] -> float32 [..., K]. The codes are those that `add_matmul` reads, stored once."""
    if matrix.bits == 32 or matrix.block_size is None:
        return nodes.add("Gather", [_weight(matrix.name), indices], output, axis=0)
    blocks = -(-matrix.columns // matrix.block_size)
    width = blocks * matrix.block_size
    table = f"{matrix.name}.rows"
    if has_split_codes(matrix):
        shape = nodes.integers(f"{table}.shape", [matrix.rows, width])
        nodes.add("Reshape", [_read_codes(nodes, matrix), shape], table)
    elif table not in nodes.constants.tensors:
        nodes.constants.alias(table, _codes(matrix.name), (matrix.rows, width * matrix.bits // 8))
    inputs = [table, indices, _read_scales(nodes, matrix)]
    if not matrix.symmetric:
        inputs.append(_zero_points(matrix.name))
    looked_up = output if width == matrix.columns else f"{output}.padded"
    nodes.add(
        "GatherBlockQuantized",
        inputs,
        looked_up,
        domain=MICROSOFT_DOMAIN,
        bits=_read_bits(matrix),
        block_size=matrix.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    if width == matrix.columns:
        return looked_up
    bounds = [nodes.integers(f"{output}.{name}", [at]) for name, at in (("from", 0), ("to", matrix.columns))]
    return nodes.add("Slice", [looked_up, *bounds, nodes.integers("last_axis", [-1])], output)


def _read_scales(nodes: GraphBuilder, matrix: Matrix) -> str:
    """Return the name of a matrix's float32 scales, cast from float16 once where they are stored so."""
    name = _scales(matrix.name)
    if matrix.scale_bits == 16 and not nodes.has(name):
        nodes.add("Cast", [_stored_scales(matrix.name)], name, to=FLOAT32_TYPE)
    return name


def has_split_codes(matrix: Matrix) -> bool:
    """Whether a matrix's codes are stored as their low halves and the bits above."""
    return matrix.bits in (5, 6)


def _read_bits(matrix: Matrix) -> int:
    """Return the bits of the codes that the operators read."""
    return 8 if has_split_codes(matrix) else matrix.bits


def _read_codes(nodes: GraphBuilder, matrix: Matrix) -> str:
    """Return the name of a matrix's codes as the operators read them.

    With 5 and 6 bits they are joined from their parts: a code's distance from its zero point 2^(bits-1) becomes the
    same distance from 128. With the top bit repeated upwards that is an exclusive or: of 5 bits h and xxxx, hhhhxxxx ^
    01110000; of 6 bits hg and xxxx, hhhgxxxx ^ 01100000.
    """
    name = _codes(matrix.name)
    if not has_split_codes(matrix) or nodes.has(name):
        return name
    bits = matrix.bits - 4
    shape = [matrix.rows, -(-matrix.columns // (matrix.block_size or 1)), matrix.block_size or 1]

    def parts(source: str, width: int) -> str:
        """Split every byte into values of some bits each, the lowest first: [N, blocks, block_size]."""
        shifts = nodes.bytes(f"codes.shifts.{width}", list(range(0, 8, width)))
        mask = nodes.bytes(f"codes.mask.{width}", [(1 << width) - 1])
        last = nodes.integers("last_axis", [-1])
        apart = nodes.add("Unsqueeze", [source, last], f"{source}.bytes")
        shifted = nodes.add("BitShift", [apart, shifts], f"{source}.shifted", direction="RIGHT")
        masked = nodes.add("BitwiseAnd", [shifted, mask], f"{source}.parts")
        return nodes.add("Reshape", [masked, nodes.integers(f"{name}.shape", shape)], f"{source}.codes")

    joined = parts(_low_codes(matrix.name), 4)
    high = parts(_high_codes(matrix.name), bits)
    moved = nodes.add("BitShift", [high, nodes.bytes("codes.shift.4", [4])], f"{name}.high.moved", direction="LEFT")
    joined = nodes.add("BitwiseOr", [joined, moved], f"{name}.joined.{bits + 3}")
    top = moved
    if bits == 2:  # the upper of the two bits alone
        top = nodes.add("BitwiseAnd", [moved, nodes.bytes("codes.top", [32])], f"{name}.top")
    for bit in range(bits + 4, 8):
        shift = nodes.bytes(f"codes.shift.{bit - bits - 3}", [bit - bits - 3])
        repeated = nodes.add("BitShift", [top, shift], f"{name}.top.{bit}", direction="LEFT")
        joined = nodes.add("BitwiseOr", [joined, repeated], f"{name}.joined.{bit}")
    flipped = nodes.bytes(f"codes.flip.{bits}", [0x70 if bits == 1 else 0x60])
    return nodes.add("BitwiseXor", [joined, flipped], name)


def _weight(name: str) -> str:
    return f"{name}.weight"


def _codes(name: str) -> str:
    return f"{name}.codes"


def _low_codes(name: str) -> str:
    return f"{name}.codes.low"


def _high_codes(name: str) -> str:
    return f"{name}.codes.high"


def _scales(name: str) -> str:
    return f"{name}.scales"


def _stored_scales(name: str) -> str:
    return f"{name}.scales.float16"


def _zero_points(name: str) -> str:
    return f"{name}.zero_points"
