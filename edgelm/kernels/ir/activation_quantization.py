"""The kernel that rounds activations to 8 bits, or 16 for weights of 8, as LLVM IR.

Each block of a row has a scale of its own, as in onnxruntime's MatMulNBits at accuracy level 4.

    quantize   a row of x, of gates and values, or of what is still to be normalized -> codes int8 or int16
               [blocks * block], scales float32 [blocks], offsets int32 [blocks]

For weights of 8 bits codes have 16 bits, in the order in which the target multiplies them (`Target.wide_codes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Final

import numpy as np
from llvmlite import ir

from edgelm.kernels.abi import COLUMNS, Format
from edgelm.kernels.ir.emitter import F32, I8, I32, I64, POINTER, SUMS, VOID, WIDE, Emitter
from edgelm.kernels.ir.math_functions import silu
from edgelm.kernels.ir.targets import Target

LEAST: Final = float(np.float32(1e-30))
"""Activations that are all smaller count as 0: beyond, a scale's inverse would overflow."""


class Kind(Enum):
    """What a row of activations is before it is quantized."""

    PLAIN = "plain"
    GATED = "gated"
    """Gates and values, twice as many: silu(gate) * value is quantized (SwiGLU; Shazeer, GLU Variants Improve
    Transformer, 2020)."""
    NORMED = "normed"
    """To be divided by its root mean square and multiplied with a weight (Zhang and Sennrich, Root Mean Square Layer
    Normalization, 2019)."""


def emit_quantize(module: ir.Module, target: Target, form: Format, kind: Kind) -> ir.Function:
    """Emit quantize(x, size, blocks, norm, epsilon, codes, scales, offsets): one row of activations.

    norm: the normalization's weight, float32 [blocks * block], read for `Kind.NORMED` alone, as is epsilon, float32,
    which is added to the mean square. Blocks of zeros have codes 0. Offsets are what the weights' zero point adds to a
    sum, with its sign changed.
    """
    name = f"quantize_{form.bits}_{form.block}_{kind.value}"
    e = Emitter(module, name, VOID, [POINTER, I64, I64, POINTER, F32, POINTER, POINTER, POINTER])
    x, size, blocks, norm, epsilon, codes, scales, offsets = e.function.args
    b, zero = e.b, ir.Constant(F32, 0.0)
    gated = kind is Kind.GATED
    sources = [x, e.at(x, size, F32)] if gated else [x]
    inverse_root = e.splat(_inverse_root(e, x, size, epsilon), WIDE) if kind is Kind.NORMED else None
    padded = [e.reserve(F32, form.block) for _ in sources]
    with e.loop(e.const(0), blocks) as (block, _, _):
        first = b.mul(block, e.const(form.block))
        rest = b.sub(size, first)
        short = b.icmp_signed("<", rest, e.const(form.block))
        with b.if_then(short, likely=False), e.loop(e.const(0), e.const(form.block)) as (i, _, _):
            inside = b.icmp_signed("<", i, rest)
            place = b.select(inside, b.add(first, i), e.const(0))
            for source, copy in zip(sources, padded, strict=True):
                e.store(b.select(inside, e.load(source, place, F32), zero), copy, i)
        here = [b.select(short, copy, e.at(x, first, F32)) for x, copy in zip(sources, padded, strict=True)]
        parts = []
        for at in range(0, form.block, COLUMNS):
            part = e.load_vector(here[0], at, F32, WIDE)
            if gated:
                part = b.fmul(silu(e, part), e.load_vector(here[1], at, F32, WIDE))
            elif inverse_root is not None:
                weight = e.load_vector(norm, b.add(first, e.const(at)), F32, WIDE)
                part = b.fmul(b.fmul(part, inverse_root), weight)
            parts.append(part)
        largest = _largest(e, parts)
        most = ir.Constant(F32, float(form.largest_code))
        inverse = b.select(b.fcmp_ordered(">", largest, ir.Constant(F32, LEAST)), b.fdiv(most, largest), zero)
        factor = e.splat(inverse, WIDE)
        total = ir.Constant(SUMS, [0] * COLUMNS)
        for i, part in enumerate(parts):
            rounded = b.fptosi(e.intrinsic("llvm.rint.v16f32", WIDE, b.fmul(part, factor)), SUMS)
            total = b.add(total, rounded)
            is_wide = form.code_bytes == 2
            narrow = target.wide_codes(b, rounded) if is_wide else b.trunc(rounded, ir.VectorType(I8, COLUMNS))
            place = e.const(i * COLUMNS * form.code_bytes)
            b.store(narrow, e.at(codes, b.add(b.mul(first, e.const(form.code_bytes)), place), I8), align=1)
        e.store(b.fdiv(largest, most), scales, block)
        whole = e.intrinsic("llvm.vector.reduce.add.v16i32", I32, total)
        e.store(b.mul(whole, ir.Constant(I32, -target.zero_point(form.bits))), offsets, block)
    b.ret_void()
    return e.function


def _inverse_root(e: Emitter, x: ir.Value, size: ir.Value, epsilon: ir.Value) -> ir.Value:
    """Emit 1 / sqrt(mean of squares + epsilon)."""
    b = e.b
    whole = b.and_(size, e.const(-COLUMNS))
    zeros = ir.Constant(WIDE, [0.0] * COLUMNS)
    with e.loop(e.const(0), whole, COLUMNS, carried=[zeros]) as (at, sums, kept):
        part = e.load_vector(x, at, F32, WIDE)
        kept.append(e.intrinsic("llvm.fma.v16f32", WIDE, part, part, sums[0]))
    total: ir.Value = ir.Constant(F32, 0.0)
    for lane in range(COLUMNS):
        total = b.fadd(total, b.extract_element(kept[0], ir.Constant(I32, lane)))
    with e.loop(whole, size, carried=[total]) as (at, totals, kept):
        value = e.load(x, at, F32)
        kept.append(b.fadd(totals[0], b.fmul(value, value)))
    mean = b.fdiv(kept[0], b.sitofp(size, F32))
    root = e.intrinsic("llvm.sqrt.f32", F32, b.fadd(mean, epsilon))
    return b.fdiv(ir.Constant(F32, 1.0), root)


def _largest(e: Emitter, parts: Sequence[ir.Value]) -> ir.Value:
    """Emit the largest absolute value; not a number where one of them is none, so that nobody takes it for a result."""
    b = e.b
    sizes = [e.intrinsic("llvm.fabs.v16f32", WIDE, part) for part in parts]
    largest, strange = sizes[0], b.fcmp_unordered("uno", parts[0], parts[0])
    for part, size in zip(parts[1:], sizes[1:], strict=True):
        largest = b.select(b.fcmp_ordered(">", largest, size), largest, size)
        strange = b.or_(strange, b.fcmp_unordered("uno", part, part))
    number = e.intrinsic("llvm.vector.reduce.fmax.v16f32", F32, largest)
    is_strange = e.intrinsic("llvm.vector.reduce.or.v16i1", ir.IntType(1), strange)
    return b.select(is_strange, ir.Constant(F32, float("nan")), number)
