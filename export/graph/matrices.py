"""Weight matrices in a graph: how each is stored, and the nodes that multiply by it or look up its rows.

Scales are stored as float16 if that loses no relevant precision, and cast to float32 once, when the graph is loaded:
half the bytes on disk for the same kernels. Codes of 5 and 6 bits are stored as the low 4 bits and the bits above, and
joined to the 8-bit codes that onnxruntime's operators read. onnxruntime folds these nodes when it loads the graph.
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
    """Write a matrix as float32: [N, K] if it is a `table` of rows, otherwise transposed, as MatMul reads it."""
    whole = rows.read_all()
    initializers.add(_weight(name), whole if table else np.ascontiguousarray(whole.T))
    return Matrix(name, *rows.shape, 32)


def store_packed(initializers: FileInitializers, name: str, packed: PackedMatrix, spec: QuantSpec) -> Matrix:
    """Write a quantized matrix: codes, scales and zero points if it has them."""
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
    """Yield name, dtype and shape of the tensors that store a matrix, in the order they are written."""
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
        nodes.add_node("MatMul", [value, _weight(matrix.name)], product)
        return product if bias is None else nodes.add_node("Add", [product, bias], output)
    zero_points = "" if matrix.symmetric else _zero_points(matrix.name)
    inputs = [value, _read_codes(nodes, matrix), _read_scales(nodes, matrix), zero_points, "", bias or ""]
    while not inputs[-1]:
        inputs.pop()
    return nodes.add_node(
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
        return nodes.add_node("Gemm", [value, _weight(matrix.name)], output, transB=1)
    return add_matmul(nodes, matrix, value, None, output)


def add_lookup(nodes: GraphBuilder, matrix: Matrix, indices: str, output: str) -> str:
    """Look up rows of a table: int64 [...] -> float32 [..., K]. Reads the same stored codes as `add_matmul`."""
    if matrix.bits == 32 or matrix.block_size is None:
        return nodes.add_node("Gather", [_weight(matrix.name), indices], output, axis=0)
    blocks = -(-matrix.columns // matrix.block_size)
    width = blocks * matrix.block_size
    table = f"{matrix.name}.rows"
    if has_split_codes(matrix):
        shape = nodes.int64_constant(f"{table}.shape", [matrix.rows, width])
        nodes.add_node("Reshape", [_read_codes(nodes, matrix), shape], table)
    elif table not in nodes.constants.tensors:
        nodes.constants.alias(table, _codes(matrix.name), (matrix.rows, width * matrix.bits // 8))
    inputs = [table, indices, _read_scales(nodes, matrix)]
    if not matrix.symmetric:
        inputs.append(_zero_points(matrix.name))
    looked_up = output if width == matrix.columns else f"{output}.padded"
    nodes.add_node(
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
    bounds = [nodes.int64_constant(f"{output}.{name}", [at]) for name, at in (("from", 0), ("to", matrix.columns))]
    return nodes.add_node("Slice", [looked_up, *bounds, nodes.int64_constant("last_axis", [-1])], output)


def _read_scales(nodes: GraphBuilder, matrix: Matrix) -> str:
    """Return the name of a matrix's float32 scales. Adds one Cast if they are stored as float16."""
    name = _scales(matrix.name)
    if matrix.scale_bits == 16 and not nodes.has_output(name):
        nodes.add_node("Cast", [_stored_scales(matrix.name)], name, to=FLOAT32_TYPE)
    return name


def has_split_codes(matrix: Matrix) -> bool:
    """Return whether codes are stored as the low 4 bits and the bits above."""
    return matrix.bits in (5, 6)


def _read_bits(matrix: Matrix) -> int:
    """Return the bits of the codes that the operators read."""
    return 8 if has_split_codes(matrix) else matrix.bits


def _read_codes(nodes: GraphBuilder, matrix: Matrix) -> str:
    """Return the name of a matrix's codes as the operators read them.

    Codes of 5 and 6 bits are joined from their parts: the distance of a code from its zero point 2^(bits-1) becomes the
    same distance from 128. That is the top bit repeated upwards, then an exclusive or: for 5 bits h and xxxx, hhhhxxxx
    ^ 01110000; for 6 bits hg and xxxx, hhhgxxxx ^ 01100000.
    """
    name = _codes(matrix.name)
    if not has_split_codes(matrix) or nodes.has_output(name):
        return name
    bits = matrix.bits - 4
    shape = [matrix.rows, -(-matrix.columns // (matrix.block_size or 1)), matrix.block_size or 1]

    def parts(source: str, width: int) -> str:
        """Split each byte into values of `width` bits, the lowest first: [N, blocks, block_size]."""
        shifts = nodes.uint8_constant(f"codes.shifts.{width}", list(range(0, 8, width)))
        mask = nodes.uint8_constant(f"codes.mask.{width}", [(1 << width) - 1])
        last = nodes.int64_constant("last_axis", [-1])
        apart = nodes.add_node("Unsqueeze", [source, last], f"{source}.bytes")
        shifted = nodes.add_node("BitShift", [apart, shifts], f"{source}.shifted", direction="RIGHT")
        masked = nodes.add_node("BitwiseAnd", [shifted, mask], f"{source}.parts")
        return nodes.add_node("Reshape", [masked, nodes.int64_constant(f"{name}.shape", shape)], f"{source}.codes")

    joined = parts(_low_codes(matrix.name), 4)
    high = parts(_high_codes(matrix.name), bits)
    moved = nodes.add_node(
        "BitShift", [high, nodes.uint8_constant("codes.shift.4", [4])], f"{name}.high.moved", direction="LEFT"
    )
    joined = nodes.add_node("BitwiseOr", [joined, moved], f"{name}.joined.{bits + 3}")
    top = moved
    if bits == 2:  # only the upper of the two bits
        top = nodes.add_node("BitwiseAnd", [moved, nodes.uint8_constant("codes.top", [32])], f"{name}.top")
    for bit in range(bits + 4, 8):
        shift = nodes.uint8_constant(f"codes.shift.{bit - bits - 3}", [bit - bits - 3])
        repeated = nodes.add_node("BitShift", [top, shift], f"{name}.top.{bit}", direction="LEFT")
        joined = nodes.add_node("BitwiseOr", [joined, repeated], f"{name}.joined.{bit}")
    flipped = nodes.uint8_constant(f"codes.flip.{bits}", [0x70 if bits == 1 else 0x60])
    return nodes.add_node("BitwiseXor", [joined, flipped], name)


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
