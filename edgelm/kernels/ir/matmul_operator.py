"""The operator around the kernels, as LLVM IR: what onnxruntime calls in a step, without Python.

    Y, scratch = MatMulInt4Block32(X, skip?)      attributes K, N, GATED, WEIGHTS, SCALES, BIAS, NORM, EPSILON

X: float32 [..., K], or [..., 2 K] if GATED is 1: gates and values of SwiGLU. Y: float32 [..., N], to which skip, like
it, is added. WEIGHTS, SCALES, BIAS and NORM are places in a file: weights uint8 and scales float16 in panels (see
`packing`), bias float32 [16 * panels], and the weight of an RMSNorm that X passes first, float32 [blocks * block]; -1
says that there is none. EPSILON is that norm's, a float32 as the integer of its bits. The scratch is an output so that
onnxruntime's arena provides it; nothing reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from llvmlite import ir

from edgelm.kernels.abi import COLUMNS, DESTROY, HOOK, REGISTER, ROUNDED_BYTES, Fault, Format, State
from edgelm.kernels.ir.activation_quantization import Kind, emit_quantize
from edgelm.kernels.ir.attention_operator import emit_attention
from edgelm.kernels.ir.emitter import F32, I8, I32, I64, POINTER, VOID, Emitter
from edgelm.kernels.ir.gather_operator import emit_look_up
from edgelm.kernels.ir.kernel_context import MOST_DIMENSIONS, Call
from edgelm.kernels.ir.matmul_kernels import emit_rows
from edgelm.kernels.ir.targets import Target


class _Task(IntEnum):
    """Fields of what the threads share during one call."""

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
    PANELS_A_TASK = 10
    CODES = 11
    FACTORS = 12
    OFFSETS = 13
    SKIP = 14
    NORM = 15
    EPSILON = 16


TOGETHER: Final = 4
"""Panels that all rows pass before the next ones: they stay in the nearest cache."""


def kernels_module(target: Target, formats: Sequence[Format]) -> tuple[ir.Module, list[str]]:
    """Return the code of attention, of products and of tables of some formats, and the names to export."""
    module = ir.Module("edgelm")
    module.triple = target.triple
    _emit_registration(module)
    for form in formats:
        _emit_compute(module, target, form)
        emit_look_up(module, form)
    names = [name for form in formats for name in (form.compute, form.look_up)]
    return module, [HOOK, REGISTER, DESTROY, emit_attention(module, target), *names]


def _emit_registration(module: ir.Module) -> None:
    hook = ir.GlobalVariable(module, POINTER, "hook")
    hook.linkage = "internal"
    hook.initializer = ir.Constant(POINTER, None)
    setter = Emitter(module, HOOK, VOID, [POINTER], export=True)
    setter.b.store(setter.function.args[0], hook)
    setter.b.ret_void()
    register = Emitter(module, REGISTER, POINTER, [POINTER, POINTER], export=True)
    kind = ir.FunctionType(POINTER, [POINTER, POINTER])
    function = register.b.ptrtoint(register.b.load(hook, typ=POINTER), I64)
    register.b.ret(register.call_address(function, kind, register.function.args))
    destroy = Emitter(module, DESTROY, VOID, [POINTER], export=True)
    destroy.b.ret_void()


def _emit_compute(module: ir.Module, target: Target, form: Format) -> None:
    quantize, quantize_gated, quantize_normed = (_emit_quantize_task(module, target, form, kind) for kind in Kind)
    multiply = _emit_multiply_task(module, target, form)
    e = Emitter(module, form.compute, POINTER, [POINTER, POINTER], export=True)
    state, context = e.function.args
    b = e.b
    call = Call(e, state, context)
    task = e.reserve(I64, len(_Task))

    def put(field: _Task, value: ir.Value) -> None:
        e.store(value, task, field)

    x = call.input(0)
    put(_Task.X, call.data(x))
    skip = call.input(1)
    put(_Task.SKIP, call.optional(skip))
    for field in (_Task.WEIGHTS, _Task.SCALES, _Task.BIAS, _Task.NORM, _Task.EPSILON):
        put(field, e.load(state, State[field.name], I64))
    rank = call.rank(x)
    call.require(b.icmp_signed(">", rank, e.const(0)), Fault.RANK)
    last = b.sub(rank, e.const(1))
    rows = call.product(last)
    size, columns = (e.load(state, field, I64) for field in (State.K, State.N))
    gated = b.icmp_signed("!=", e.load(state, State.GATED, I64), e.const(0))
    width = b.select(gated, b.add(size, size), size)
    call.require_equal(Fault.WIDTH, (e.load(call.shape, last, I64), width))
    e.store(columns, call.shape, last)
    own = e.reserve(I64, MOST_DIMENSIONS)
    with b.if_then(call.is_given(skip)):
        _require_alike(e, call, rank, own, skip)
    put(_Task.Y, call.output_like_shape(0, rank))
    blocks = b.sdiv(b.add(size, e.const(form.block - 1)), e.const(form.block))
    panels = b.sdiv(b.add(columns, e.const(COLUMNS - 1)), e.const(COLUMNS))
    cells = b.mul(rows, blocks)
    code_bytes = b.mul(cells, e.const(form.block * form.code_bytes))
    scratch = call.output(1, [b.add(code_bytes, b.mul(cells, e.const(ROUNDED_BYTES)))])
    put(_Task.CODES, scratch)
    put(_Task.FACTORS, e.at(scratch, code_bytes, I8))
    put(_Task.OFFSETS, e.at(scratch, b.add(code_bytes, b.mul(cells, e.const(4))), I8))
    for field, value in ((_Task.ROWS, rows), (_Task.K, size), (_Task.N, columns), (_Task.BLOCKS, blocks)):
        put(field, value)
    panels_a_task = e.load(state, State.PANELS_A_TASK, I64)
    put(_Task.PANELS, panels)
    put(_Task.PANELS_A_TASK, panels_a_task)
    normed = b.icmp_signed("!=", e.load(state, State.NORM, I64), e.const(0))
    call.for_each(b.select(gated, quantize_gated, b.select(normed, quantize_normed, quantize)), rows, task)
    call.for_each(multiply, b.sdiv(b.add(panels, b.sub(panels_a_task, e.const(1))), panels_a_task), task)
    call.end()


def _require_alike(e: Emitter, call: Call, rank: ir.Value, own: ir.Value, skip: ir.Value) -> None:
    """Emit a fault where what is added has not the dimensions in `shape`, which go through `own` meanwhile."""
    b = e.b
    with e.loop(e.const(0), rank) as (axis, _, _):
        e.store(e.load(call.shape, axis, I64), own, axis)
    call.require_equal(Fault.SKIP, (call.rank(skip), rank))
    with e.loop(e.const(0), rank, carried=[ir.Constant(ir.IntType(1), 1)]) as (axis, same, kept):
        kept.append(b.and_(same[0], b.icmp_signed("==", e.load(call.shape, axis, I64), e.load(own, axis, I64))))
    call.require(kept[0], Fault.SKIP)


_NUMBERS: Final = {_Task.ROWS, _Task.K, _Task.N, _Task.BLOCKS, _Task.PANELS, _Task.PANELS_A_TASK}


def _fields(e: Emitter, task: ir.Value, *fields: _Task) -> list[ir.Value]:
    return [e.load(task, field, I64 if field in _NUMBERS else POINTER) for field in fields]


def _emit_quantize_task(module: ir.Module, target: Target, form: Format, kind: Kind) -> ir.Function:
    """Emit what quantizes row `index`."""
    kernel = emit_quantize(module, target, form, kind)
    e = Emitter(module, f"{kernel.name}_task", VOID, [POINTER, I64])
    task, row = e.function.args
    wanted = (_Task.X, _Task.K, _Task.BLOCKS, _Task.NORM, _Task.CODES, _Task.FACTORS, _Task.OFFSETS)
    x, size, blocks, norm, codes, factors, offsets = _fields(e, task, *wanted)
    epsilon = e.b.load(e.at(task, _Task.EPSILON, I64), typ=F32)
    cell = e.b.mul(row, blocks)
    length = e.b.mul(size, e.const(2)) if kind is Kind.GATED else size
    e.b.call(
        kernel,
        [
            e.at(x, e.b.mul(row, length), F32), size, blocks, norm, epsilon,
            e.at(codes, e.b.mul(cell, e.const(form.block * form.code_bytes)), I8),
            e.at(factors, cell, F32), e.at(offsets, cell, I32),
        ],
    )  # fmt: skip
    e.b.ret_void()
    return e.function


def _emit_multiply_task(module: ir.Module, target: Target, form: Format) -> ir.Function:
    """Emit what multiplies all rows with the panels of task `index`, a few panels after the other."""
    call_rows = emit_rows(module, target, form)
    e = Emitter(module, f"multiply_task_{form.bits}_{form.block}", VOID, [POINTER, I64])
    task, index = e.function.args
    fields = (_Task.ROWS, _Task.WEIGHTS, _Task.SCALES, _Task.BLOCKS, _Task.PANELS, _Task.PANELS_A_TASK)
    rows, weights, scales, blocks, panels, panels_a_task = _fields(e, task, *fields)
    others = _fields(e, task, _Task.CODES, _Task.FACTORS, _Task.OFFSETS, _Task.BIAS, _Task.SKIP, _Task.Y, _Task.N)
    start = e.b.mul(index, panels_a_task)
    stop = e.smaller(e.b.add(start, panels_a_task), panels)
    alone = e.b.icmp_signed("==", rows, e.const(1))
    together = e.b.select(alone, e.b.sub(stop, start), e.const(TOGETHER))
    with e.loop(start, stop, together) as (first, _, _):
        last = e.smaller(e.b.add(first, together), stop)
        call_rows(e, [rows, weights, scales, blocks, first, last, *others])
    e.b.ret_void()
    return e.function
