"""The operator around the kernels, as LLVM IR: what onnxruntime calls in a step, without Python.

    Y, scratch = MatMulInt4Block32(X, weights, scales, bias?)      attributes K, N, GATED

X: float32 [..., K], or [..., 2 K] if GATED is 1: gates and values of SwiGLU; weights: uint8, scales: float16, in panels
(see `packing`); Y: float32 [..., N]. The scratch is an output so that onnxruntime's arena provides it; nothing reads
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final

from llvmlite import ir

from edgelm.native.emitter import F32, I8, I32, I64, POINTER, VOID, Emitter
from edgelm.native.formats import COLUMNS, DESTROY, HOOK, REGISTER, Format, State
from edgelm.native.multiplying import emit_rows
from edgelm.native.quantizing import emit_quantize
from edgelm.native.targets import Target


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


MOST_DIMENSIONS: Final = 8
TOGETHER: Final = 4
"""Panels that all rows pass before the next ones: they stay in the nearest cache."""


def kernels_module(target: Target, formats: Sequence[Format]) -> tuple[ir.Module, list[str]]:
    """Return the code of operators for some formats, and the names to export."""
    module = ir.Module("edgelm")
    module.triple = target.triple
    _emit_registration(module)
    for form in formats:
        _emit_compute(module, target, form)
    return module, [HOOK, REGISTER, DESTROY, *(form.compute for form in formats)]


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
    register.b.ret(_call(register, function, kind, list(register.function.args)))
    destroy = Emitter(module, DESTROY, VOID, [POINTER], export=True)
    destroy.b.ret_void()


def _call(e: Emitter, function: ir.Value, kind: ir.FunctionType, arguments: list[ir.Value]) -> ir.Value:
    """Call a function by its address, an integer."""
    return e.b.call(e.b.inttoptr(function, kind.as_pointer()), arguments)


def _emit_compute(module: ir.Module, target: Target, form: Format) -> None:
    quantize, quantize_gated = (_emit_quantize_task(module, target, form, gated) for gated in (False, True))
    multiply = _emit_multiply_task(module, target, form)
    e = Emitter(module, form.compute, VOID, [POINTER, POINTER], export=True)
    state, context = e.function.args
    b = e.b
    out = e.reserve(POINTER)
    rank_place = e.reserve(I64)
    dimensions = e.reserve(I64, MOST_DIMENSIONS)
    task = e.reserve(I64, len(_Task))

    def api(field: State, *arguments: ir.Value) -> None:
        """Call a function of onnxruntime; what it returns is null for arguments as these are."""
        function = e.load(state, field, I64)
        kind = ir.FunctionType(POINTER, [value.type for value in arguments])
        _call(e, function, kind, list(arguments))

    def result() -> ir.Value:
        return b.load(out, typ=POINTER)

    def put(field: _Task, value: ir.Value) -> None:
        e.store(value, task, field)

    def data_of(value: ir.Value) -> ir.Value:
        api(State.GET_DATA, value, out)
        return result()

    def output(index: int, rank: ir.Value) -> ir.Value:
        api(State.GET_OUTPUT, context, e.const(index), dimensions, rank, out)
        return data_of(result())

    api(State.GET_INPUT, context, e.const(0), out)
    x = result()
    put(_Task.X, data_of(x))
    for index, field in ((1, _Task.WEIGHTS), (2, _Task.SCALES)):
        api(State.GET_INPUT, context, e.const(index), out)
        put(field, data_of(result()))
    put(_Task.BIAS, ir.Constant(POINTER, None))
    api(State.GET_INPUT, context, e.const(3), out)
    bias = result()
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(bias, I64), e.const(0))):
        put(_Task.BIAS, data_of(bias))
    api(State.GET_SHAPE, x, out)
    shape = result()
    api(State.GET_RANK, shape, rank_place)
    rank = b.load(rank_place, typ=I64)
    api(State.GET_DIMENSIONS, shape, dimensions, rank)
    function = e.load(state, State.RELEASE_SHAPE, I64)
    _call(e, function, ir.FunctionType(VOID, [POINTER]), [shape])
    last = b.sub(rank, e.const(1))
    with e.loop(e.const(0), last, carried=[e.const(1)]) as (axis, counts, kept):
        kept.append(b.mul(counts[0], e.load(dimensions, axis, I64)))
    rows = kept[0]
    size, columns = (e.load(state, field, I64) for field in (State.K, State.N))
    e.store(columns, dimensions, last)
    put(_Task.Y, output(0, rank))
    blocks = b.sdiv(b.add(size, e.const(form.block - 1)), e.const(form.block))
    panels = b.sdiv(b.add(columns, e.const(COLUMNS - 1)), e.const(COLUMNS))
    cells = b.mul(rows, blocks)
    code_bytes = b.mul(cells, e.const(form.block))
    e.store(b.add(code_bytes, b.mul(cells, e.const(8))), dimensions, 0)
    scratch = output(1, e.const(1))
    put(_Task.CODES, scratch)
    put(_Task.FACTORS, e.at(scratch, code_bytes, I8))
    put(_Task.OFFSETS, e.at(scratch, b.add(code_bytes, b.mul(cells, e.const(4))), I8))
    for field, value in ((_Task.ROWS, rows), (_Task.K, size), (_Task.N, columns), (_Task.BLOCKS, blocks)):
        put(field, value)
    panels_a_task = e.load(state, State.PANELS_A_TASK, I64)
    put(_Task.PANELS, panels)
    put(_Task.PANELS_A_TASK, panels_a_task)
    alone = b.icmp_signed("==", rows, e.const(1))
    gated = b.icmp_signed("!=", e.load(state, State.GATED, I64), e.const(0))
    chosen = b.select(gated, quantize_gated, quantize)
    with b.if_else(alone) as (then, otherwise):
        with then:
            kind = ir.FunctionType(VOID, [POINTER, I64])
            _call(e, b.ptrtoint(chosen, I64), kind, [task, e.const(0)])
        with otherwise:
            api(State.PARALLEL_FOR, context, chosen, rows, e.const(0), task)
    tasks = b.sdiv(b.add(panels, b.sub(panels_a_task, e.const(1))), panels_a_task)
    api(State.PARALLEL_FOR, context, multiply, tasks, e.const(0), task)
    b.ret_void()


def _fields(e: Emitter, task: ir.Value, *fields: _Task) -> list[ir.Value]:
    pointers = {_Task.X, _Task.WEIGHTS, _Task.SCALES, _Task.BIAS, _Task.Y, _Task.CODES, _Task.FACTORS, _Task.OFFSETS}
    return [e.load(task, field, POINTER if field in pointers else I64) for field in fields]


def _emit_quantize_task(module: ir.Module, target: Target, form: Format, gated: bool) -> ir.Function:
    """Emit what quantizes row `index`."""
    kernel = emit_quantize(module, target, form, gated)
    e = Emitter(module, f"{kernel.name}_task", VOID, [POINTER, I64])
    task, row = e.function.args
    wanted = (_Task.X, _Task.K, _Task.BLOCKS, _Task.CODES, _Task.FACTORS, _Task.OFFSETS)
    x, size, blocks, codes, factors, offsets = _fields(e, task, *wanted)
    cell = e.b.mul(row, blocks)
    length = e.b.mul(size, e.const(2)) if gated else size
    e.b.call(
        kernel,
        [
            e.at(x, e.b.mul(row, length), F32), size, blocks, e.at(codes, e.b.mul(cell, e.const(form.block)), I8),
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
    others = _fields(e, task, _Task.CODES, _Task.FACTORS, _Task.OFFSETS, _Task.BIAS, _Task.Y, _Task.N)
    start = e.b.mul(index, panels_a_task)
    stop = e.smaller(e.b.add(start, panels_a_task), panels)
    alone = e.b.icmp_signed("==", rows, e.const(1))
    together = e.b.select(alone, e.b.sub(stop, start), e.const(TOGETHER))
    with e.loop(start, stop, together) as (first, _, _):
        last = e.smaller(e.b.add(first, together), stop)
        call_rows(e, [rows, weights, scales, blocks, first, last, *others])
    e.b.ret_void()
    return e.function
