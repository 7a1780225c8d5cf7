"""The kernel that quantizes activations to 8 bits, or to 16 bits for 8-bit weights, as LLVM IR.

Each block of a row has its own scale, as in onnxruntime's MatMulNBits at accuracy level 4.

    quantize   a row of x, after its prologue -> codes int8 or int16 [blocks * block_size], scales float32 [blocks],
               zero-point terms int32 [blocks]

16-bit codes are in the order in which the target multiplies them (`Target.wide_codes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

import numpy as np
from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS, WeightFormat
from edgelm.kernels.ir.emitter import F32, F32X16, I8, I32, I32X16, I64, POINTER, VOID, Emitter
from edgelm.kernels.ir.math_functions import silu
from edgelm.kernels.ir.targets import Target

MIN_ABS_MAX: Final = float(np.float32(1e-30))
"""A block whose activations are all smaller gets codes 0: the inverse of its scale would overflow."""


class Prologue(Enum):
    """What is computed from a row before it is quantized."""

    PLAIN = "plain"
    """Nothing."""
    GATED = "gated"
    """silu(gate) * value of a row of gates and then values, twice as long (SwiGLU; Shazeer, GLU Variants Improve
    Transformer, 2020)."""
    NORMED = "normed"
    """Division by the root mean square and multiplication with a weight (RMSNorm; Zhang and Sennrich, Root Mean Square
    Layer Normalization, 2019)."""


def emit_quantize(module: ir.Module, target: Target, fmt: WeightFormat, kind: Prologue) -> ir.Function:
    """Emit quantize(x, size, blocks, norm, epsilon, codes, scales, zero_point_terms): one row of activations.

    norm: weight of the RMSNorm, float32 [blocks * block_size], and epsilon: float32, added to the mean square; both
    are read only for `Prologue.NORMED`. A zero-point term is minus the zero point of the weights times the sum of the
    block's codes.
    """
    name = f"quantize_{fmt.bits}_{fmt.block_size}_{kind.value}"
    e = Emitter(module, name, VOID, [POINTER, I64, I64, POINTER, F32, POINTER, POINTER, POINTER])
    x, size, blocks, norm, epsilon, codes, scales, zero_point_terms = e.function.args
    b, zero = e.b, ir.Constant(F32, 0.0)
    gated = kind is Prologue.GATED
    sources = [x, e.gep(x, size, F32)] if gated else [x]
    inverse_root = e.splat(_inverse_root(e, x, size, epsilon), F32X16) if kind is Prologue.NORMED else None
    padded = [e.alloca(F32, fmt.block_size) for _ in sources]
    with e.loop(e.const(0), blocks) as (block, _, _):
        first = b.mul(block, e.const(fmt.block_size))
        rest = b.sub(size, first)
        short = b.icmp_signed("<", rest, e.const(fmt.block_size))
        with b.if_then(short, likely=False), e.loop(e.const(0), e.const(fmt.block_size)) as (i, _, _):
            inside = b.icmp_signed("<", i, rest)
            index = b.select(inside, b.add(first, i), e.const(0))
            for source, copy in zip(sources, padded, strict=True):
                e.store(b.select(inside, e.load(source, index, F32), zero), copy, i)
        here = [b.select(short, copy, e.gep(x, first, F32)) for x, copy in zip(sources, padded, strict=True)]
        parts = []
        for at in range(0, fmt.block_size, PANEL_COLUMNS):
            part = e.load_vector(here[0], at, F32, F32X16)
            if gated:
                part = b.fmul(silu(e, part), e.load_vector(here[1], at, F32, F32X16))
            elif inverse_root is not None:
                weight = e.load_vector(norm, b.add(first, e.const(at)), F32, F32X16)
                part = b.fmul(b.fmul(part, inverse_root), weight)
            parts.append(part)
        largest = _largest(e, parts)
        max_code = ir.Constant(F32, float(fmt.max_code))
        inverse = b.select(b.fcmp_ordered(">", largest, ir.Constant(F32, MIN_ABS_MAX)), b.fdiv(max_code, largest), zero)
        factor = e.splat(inverse, F32X16)
        total = ir.Constant(I32X16, [0] * PANEL_COLUMNS)
        for i, part in enumerate(parts):
            rounded = b.fptosi(e.intrinsic("llvm.rint.v16f32", F32X16, b.fmul(part, factor)), I32X16)
            total = b.add(total, rounded)
            is_wide = fmt.code_bytes == 2
            narrow = target.wide_codes(b, rounded) if is_wide else b.trunc(rounded, ir.VectorType(I8, PANEL_COLUMNS))
            offset = e.const(i * PANEL_COLUMNS * fmt.code_bytes)
            b.store(narrow, e.gep(codes, b.add(b.mul(first, e.const(fmt.code_bytes)), offset), I8), align=1)
        e.store(b.fdiv(largest, max_code), scales, block)
        whole = e.intrinsic("llvm.vector.reduce.add.v16i32", I32, total)
        e.store(b.mul(whole, ir.Constant(I32, -target.zero_point(fmt.bits))), zero_point_terms, block)
    b.ret_void()
    return e.function


def _inverse_root(e: Emitter, x: ir.Value, size: ir.Value, epsilon: ir.Value) -> ir.Value:
    """Emit 1 / sqrt(mean of squares + epsilon)."""
    b = e.b
    whole = b.and_(size, e.const(-PANEL_COLUMNS))
    zeros = ir.Constant(F32X16, [0.0] * PANEL_COLUMNS)
    with e.loop(e.const(0), whole, PANEL_COLUMNS, carried=[zeros]) as (at, sums, updated):
        part = e.load_vector(x, at, F32, F32X16)
        updated.append(e.intrinsic("llvm.fma.v16f32", F32X16, part, part, sums[0]))
    total: ir.Value = ir.Constant(F32, 0.0)
    for lane in range(PANEL_COLUMNS):
        total = b.fadd(total, b.extract_element(updated[0], ir.Constant(I32, lane)))
    with e.loop(whole, size, carried=[total]) as (at, totals, updated):
        value = e.load(x, at, F32)
        updated.append(b.fadd(totals[0], b.fmul(value, value)))
    mean = b.fdiv(updated[0], b.sitofp(size, F32))
    root = e.intrinsic("llvm.sqrt.f32", F32, b.fadd(mean, epsilon))
    return b.fdiv(ir.Constant(F32, 1.0), root)


def _largest(e: Emitter, parts: Sequence[ir.Value]) -> ir.Value:
    """Emit the largest absolute value; NaN if any value is NaN, so that NaN reaches the output."""
    b = e.b
    sizes = [e.intrinsic("llvm.fabs.v16f32", F32X16, part) for part in parts]
    largest, are_nan = sizes[0], b.fcmp_unordered("uno", parts[0], parts[0])
    for part, size in zip(parts[1:], sizes[1:], strict=True):
        largest = b.select(b.fcmp_ordered(">", largest, size), largest, size)
        are_nan = b.or_(are_nan, b.fcmp_unordered("uno", part, part))
    number = e.intrinsic("llvm.vector.reduce.fmax.v16f32", F32, largest)
    is_nan = e.intrinsic("llvm.vector.reduce.or.v16i1", ir.IntType(1), are_nan)
    return b.select(is_nan, ir.Constant(F32, float("nan")), number)
