"""The MatMul operator, as LLVM IR.

    Y, scratch = MatMulInt4Block32(X, skip?)      attributes K, N, GATED, WEIGHTS, SCALES, BIAS, NORM, EPSILON

X: float32 [..., K], or [..., 2 K] if GATED is 1: gates and values of SwiGLU. Y: float32 [..., N]. skip has the shape of
Y and is added to it. WEIGHTS, SCALES, BIAS and NORM are offsets in the data file: weights uint8 and scales float16 in
panels (see `rewrite.panel_layout`), bias float32 [16 * panels], and the weight of an RMSNorm that is applied to X
first, float32 [blocks * block_size]; BIAS and NORM are -1 if absent. EPSILON is that of the RMSNorm, the bits of a
float32 as an integer. scratch is an output only because onnxruntime's arena then allocates it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from llvmlite import ir

from edgelm.kernels.abi import (
    PANEL_COLUMNS,
    QUANT_PARAM_BYTES,
    InputErrorCode,
    StateField,
    WeightFormat,
)
from edgelm.kernels.ir.activation_quantization import Prologue, emit_quantize
from edgelm.kernels.ir.emitter import F32, I8, I32, I64, POINTER, VOID, Emitter
from edgelm.kernels.ir.kernel_context import MAX_RANK, KernelContext
from edgelm.kernels.ir.matmul_kernels import emit_matmul
from edgelm.kernels.ir.targets import Target


class _MatMulParam(IntEnum):
    """Fields of the parameter block that the threads share during one call, 64 bits each."""

    X = 0
    WEIGHTS = 1
    SCALES = 2
    BIAS = 3
    Y = 4
    ROWS = 5
    K = 6
    N = 7
    BLOCKS = 8
    PANELS = 9
    PANELS_PER_TASK = 10
    CODES = 11
    ACTIVATION_SCALES = 12
    ZERO_POINT_TERMS = 13
    SKIP = 14
    NORM = 15
    EPSILON = 16


PANELS_PER_PASS: Final = 4
"""Panels that are multiplied with all rows before the next panels: they stay in the L1 cache."""


def emit_matmul_operator(module: ir.Module, target: Target, fmt: WeightFormat) -> None:
    """Emit the operator for matrices of a format."""
    quantize, quantize_gated, quantize_normed = (_emit_quantize_task(module, target, fmt, kind) for kind in Prologue)
    multiply = _emit_multiply_task(module, target, fmt)
    e = Emitter(module, fmt.matmul_symbol, POINTER, [POINTER, POINTER], export=True)
    state, context = e.function.args
    b = e.b
    ctx = KernelContext(e, state, context)
    params = e.alloca(I64, len(_MatMulParam))

    def put(field: _MatMulParam, value: ir.Value) -> None:
        e.store(value, params, field)

    x = ctx.input(0)
    put(_MatMulParam.X, ctx.data(x))
    skip = ctx.input(1)
    put(_MatMulParam.SKIP, ctx.optional(skip))
    for field in (
        _MatMulParam.WEIGHTS,
        _MatMulParam.SCALES,
        _MatMulParam.BIAS,
        _MatMulParam.NORM,
        _MatMulParam.EPSILON,
    ):
        put(field, e.load(state, StateField[field.name], I64))
    rank = ctx.rank(x)
    ctx.require(b.icmp_signed(">", rank, e.const(0)), InputErrorCode.RANK)
    last = b.sub(rank, e.const(1))
    rows = ctx.leading_elements(last)
    size, columns = (e.load(state, field, I64) for field in (StateField.K, StateField.N))
    gated = b.icmp_signed("!=", e.load(state, StateField.GATED, I64), e.const(0))
    width = b.select(gated, b.add(size, size), size)
    ctx.require_equal(InputErrorCode.WIDTH, (e.load(ctx.shape, last, I64), width))
    e.store(columns, ctx.shape, last)
    own = e.alloca(I64, MAX_RANK)
    with b.if_then(ctx.is_given(skip)):
        _require_same_shape(e, ctx, rank, own, skip)
    put(_MatMulParam.Y, ctx.output_like_shape(0, rank))
    blocks = b.sdiv(b.add(size, e.const(fmt.block_size - 1)), e.const(fmt.block_size))
    panels = b.sdiv(b.add(columns, e.const(PANEL_COLUMNS - 1)), e.const(PANEL_COLUMNS))
    cells = b.mul(rows, blocks)
    code_bytes = b.mul(cells, e.const(fmt.block_size * fmt.code_bytes))
    scratch = ctx.output(1, [b.add(code_bytes, b.mul(cells, e.const(QUANT_PARAM_BYTES)))])
    put(_MatMulParam.CODES, scratch)
    put(_MatMulParam.ACTIVATION_SCALES, e.gep(scratch, code_bytes, I8))
    put(_MatMulParam.ZERO_POINT_TERMS, e.gep(scratch, b.add(code_bytes, b.mul(cells, e.const(4))), I8))
    for field, value in (
        (_MatMulParam.ROWS, rows),
        (_MatMulParam.K, size),
        (_MatMulParam.N, columns),
        (_MatMulParam.BLOCKS, blocks),
    ):
        put(field, value)
    panels_per_task = e.load(state, StateField.PANELS_PER_TASK, I64)
    put(_MatMulParam.PANELS, panels)
    put(_MatMulParam.PANELS_PER_TASK, panels_per_task)
    normed = b.icmp_signed("!=", e.load(state, StateField.NORM, I64), e.const(0))
    ctx.parallel_for(b.select(gated, quantize_gated, b.select(normed, quantize_normed, quantize)), rows, params)
    ctx.parallel_for(multiply, b.sdiv(b.add(panels, b.sub(panels_per_task, e.const(1))), panels_per_task), params)
    ctx.end()


def _require_same_shape(e: Emitter, ctx: KernelContext, rank: ir.Value, own: ir.Value, skip: ir.Value) -> None:
    """Emit the return of an error if skip does not have the dimensions in `ctx.shape`.

    own: int64 [MAX_RANK], receives a copy of them, because reading the shape of skip overwrites `ctx.shape`.
    """
    b = e.b
    with e.loop(e.const(0), rank) as (axis, _, _):
        e.store(e.load(ctx.shape, axis, I64), own, axis)
    ctx.require_equal(InputErrorCode.SKIP, (ctx.rank(skip), rank))
    with e.loop(e.const(0), rank, carried=[ir.Constant(ir.IntType(1), 1)]) as (axis, same, updated):
        updated.append(b.and_(same[0], b.icmp_signed("==", e.load(ctx.shape, axis, I64), e.load(own, axis, I64))))
    ctx.require(updated[0], InputErrorCode.SKIP)


_NUMBERS: Final = {
    _MatMulParam.ROWS,
    _MatMulParam.K,
    _MatMulParam.N,
    _MatMulParam.BLOCKS,
    _MatMulParam.PANELS,
    _MatMulParam.PANELS_PER_TASK,
}


def _load_params(e: Emitter, params: ir.Value, *fields: _MatMulParam) -> list[ir.Value]:
    return [e.load(params, field, I64 if field in _NUMBERS else POINTER) for field in fields]


def _emit_quantize_task(module: ir.Module, target: Target, fmt: WeightFormat, kind: Prologue) -> ir.Function:
    """Emit the task that quantizes one row."""
    kernel = emit_quantize(module, target, fmt, kind)
    e = Emitter(module, f"{kernel.name}_task", VOID, [POINTER, I64])
    params, row = e.function.args
    fields = (
        _MatMulParam.X,
        _MatMulParam.K,
        _MatMulParam.BLOCKS,
        _MatMulParam.NORM,
        _MatMulParam.CODES,
        _MatMulParam.ACTIVATION_SCALES,
        _MatMulParam.ZERO_POINT_TERMS,
    )
    x, size, blocks, norm, codes, activation_scales, zero_point_terms = _load_params(e, params, *fields)
    epsilon = e.b.load(e.gep(params, _MatMulParam.EPSILON, I64), typ=F32)
    cell = e.b.mul(row, blocks)
    length = e.b.mul(size, e.const(2)) if kind is Prologue.GATED else size
    e.b.call(
        kernel,
        [
            e.gep(x, e.b.mul(row, length), F32), size, blocks, norm, epsilon,
            e.gep(codes, e.b.mul(cell, e.const(fmt.block_size * fmt.code_bytes)), I8),
            e.gep(activation_scales, cell, F32), e.gep(zero_point_terms, cell, I32),
        ],
    )  # fmt: skip
    e.b.ret_void()
    return e.function


def _emit_multiply_task(module: ir.Module, target: Target, fmt: WeightFormat) -> ir.Function:
    """Emit the task that multiplies all rows with its panels, `PANELS_PER_PASS` at a time, or all for a single row."""
    call_rows = emit_matmul(module, target, fmt)
    e = Emitter(module, f"multiply_task_{fmt.bits}_{fmt.block_size}", VOID, [POINTER, I64])
    params, index = e.function.args
    fields = (
        _MatMulParam.ROWS,
        _MatMulParam.WEIGHTS,
        _MatMulParam.SCALES,
        _MatMulParam.BLOCKS,
        _MatMulParam.PANELS,
        _MatMulParam.PANELS_PER_TASK,
    )
    rows, weights, scales, blocks, panels, panels_per_task = _load_params(e, params, *fields)
    others = _load_params(
        e,
        params,
        _MatMulParam.CODES,
        _MatMulParam.ACTIVATION_SCALES,
        _MatMulParam.ZERO_POINT_TERMS,
        _MatMulParam.BIAS,
        _MatMulParam.SKIP,
        _MatMulParam.Y,
        _MatMulParam.N,
    )
    start = e.b.mul(index, panels_per_task)
    stop = e.smaller(e.b.add(start, panels_per_task), panels)
    is_single_row = e.b.icmp_signed("==", rows, e.const(1))
    per_pass = e.b.select(is_single_row, e.b.sub(stop, start), e.const(PANELS_PER_PASS))
    with e.loop(start, stop, per_pass) as (first, _, _):
        last = e.smaller(e.b.add(first, per_pass), stop)
        call_rows(e, [rows, weights, scales, blocks, first, last, *others])
    e.b.ret_void()
    return e.function
