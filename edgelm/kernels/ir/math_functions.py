"""Elementary functions of vectors, as LLVM IR."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS
from edgelm.kernels.ir.emitter import F32X16, I32X16, Emitter


def _number(value: float) -> ir.Constant:
    return ir.Constant(F32X16, [float(np.float32(value))] * PANEL_COLUMNS)


def exp(e: Emitter, x: ir.Value) -> ir.Value:
    """Emit e^x for x clamped to [-87, 88]; NaN stays NaN.

    Cephes' expf: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
    """
    b = e.b

    def fma(*arguments: ir.Value) -> ir.Value:
        return e.intrinsic("llvm.fma.v16f32", F32X16, *arguments)

    is_nan, given = b.fcmp_unordered("uno", x, x), x
    for limit, sign in ((88.0, "<"), (-87.0, ">")):  # the range in which the result is a normal number
        x = b.select(b.fcmp_ordered(sign, x, _number(limit)), x, _number(limit))
    power = e.intrinsic("llvm.rint.v16f32", F32X16, b.fmul(x, _number(1.44269504088896341)))
    rest = fma(power, _number(-0.693359375), x)
    rest = fma(power, _number(2.12194440e-4), rest)
    value = _number(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = fma(value, rest, _number(term))
    value = b.fadd(fma(b.fmul(rest, rest), value, rest), _number(1.0))
    exponent = b.shl(
        b.add(b.fptosi(power, I32X16), ir.Constant(I32X16, [127] * PANEL_COLUMNS)),
        ir.Constant(I32X16, [23] * PANEL_COLUMNS),
    )
    return b.select(is_nan, given, b.fmul(value, b.bitcast(exponent, F32X16)))


def silu(e: Emitter, x: ir.Value) -> ir.Value:
    """Emit x / (1 + e^-x)."""
    return e.b.fdiv(x, e.b.fadd(exp(e, e.b.fneg(x)), _number(1.0)))


def tanh(e: Emitter, x: ir.Value) -> ir.Value:
    """Emit 1 - 2 / (e^2x + 1), with an error of at most 1e-7."""
    double = exp(e, e.b.fadd(x, x))
    return e.b.fsub(_number(1.0), e.b.fdiv(_number(2.0), e.b.fadd(double, _number(1.0))))
