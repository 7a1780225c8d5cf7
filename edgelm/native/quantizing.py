"""The kernel that rounds activations to 8 bits, as LLVM IR.

Each block of a row has a scale of its own, as in onnxruntime's MatMulNBits at accuracy level 4.

    quantize   a row of x, or of gates and values -> codes int8 [blocks * block], scales float32 [blocks],
               offsets int32 [blocks]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from llvmlite import ir

from edgelm.native.emitter import F32, I8, I32, I64, POINTER, SUMS, VOID, WIDE, Emitter
from edgelm.native.formats import COLUMNS, Format
from edgelm.native.targets import Target

LEAST: Final = float(np.float32(1e-30))
"""Activations that are all smaller count as 0: beyond, a scale's inverse would overflow."""


def emit_quantize(module: ir.Module, target: Target, form: Format, gated: bool) -> ir.Function:
    """Emit quantize(x, size, blocks, codes, scales, offsets): one row of activations.

    `gated` rows are twice as long, gates and values: what is quantized is silu(gate) * value (SwiGLU; Shazeer, GLU
    Variants Improve Transformer, 2020). Blocks of zeros have codes 0. Offsets are what the weights' zero point
    adds to a sum, with its sign changed.
    """
    name = f"quantize_{form.bits}_{form.block}_{'gated' if gated else 'plain'}"
    e = Emitter(module, name, VOID, [POINTER, I64, I64, POINTER, POINTER, POINTER])
    x, size, blocks, codes, scales, offsets = e.function.args
    b, zero = e.b, ir.Constant(F32, 0.0)
    sources = [x, e.at(x, size, F32)] if gated else [x]
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
            parts.append(b.fmul(_silu(e, part), e.load_vector(here[1], at, F32, WIDE)) if gated else part)
        largest = _largest(e, parts)
        most = ir.Constant(F32, 127.0)
        inverse = b.select(b.fcmp_ordered(">", largest, ir.Constant(F32, LEAST)), b.fdiv(most, largest), zero)
        factor = e.splat(inverse, WIDE)
        total = ir.Constant(SUMS, [0] * COLUMNS)
        for i, part in enumerate(parts):
            rounded = b.fptosi(e.intrinsic("llvm.rint.v16f32", WIDE, b.fmul(part, factor)), SUMS)
            total = b.add(total, rounded)
            narrow = b.trunc(rounded, ir.VectorType(I8, COLUMNS))
            b.store(narrow, e.at(codes, b.add(first, e.const(i * COLUMNS)), I8), align=1)
        e.store(b.fdiv(largest, most), scales, block)
        whole = e.intrinsic("llvm.vector.reduce.add.v16i32", I32, total)
        e.store(b.mul(whole, ir.Constant(I32, -target.zero_point(form.bits))), offsets, block)
    b.ret_void()
    return e.function


def _silu(e: Emitter, x: ir.Value) -> ir.Value:
    """Emit x / (1 + exp(-x)). The exponential is Cephes' expf: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]."""
    b = e.b

    def number(value: float) -> ir.Constant:
        return ir.Constant(WIDE, [float(np.float32(value))] * COLUMNS)

    def fma(*arguments: ir.Value) -> ir.Value:
        return e.intrinsic("llvm.fma.v16f32", WIDE, *arguments)

    y = b.fneg(x)
    for limit, sign in ((88.0, "<"), (-87.0, ">")):  # where the exponential is a normal number
        y = b.select(b.fcmp_ordered(sign, y, number(limit)), y, number(limit))
    power = e.intrinsic("llvm.rint.v16f32", WIDE, b.fmul(y, number(1.44269504088896341)))
    rest = fma(power, number(-0.693359375), y)
    rest = fma(power, number(2.12194440e-4), rest)
    value = number(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = fma(value, rest, number(term))
    value = b.fadd(fma(b.fmul(rest, rest), value, rest), number(1.0))
    exponent = b.shl(
        b.add(b.fptosi(power, SUMS), ir.Constant(SUMS, [127] * COLUMNS)), ir.Constant(SUMS, [23] * COLUMNS)
    )
    exponential = b.fmul(value, b.bitcast(exponent, WIDE))
    return b.fdiv(x, b.fadd(exponential, number(1.0)))


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
