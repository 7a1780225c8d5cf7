"""The operator around the kernels of attention, as LLVM IR.

    Y, present_key, present_value, scratch = Attention(query, key?, value?, past_key, past_value, seqlens, cos?, sin?,
                                                       positions?)

It computes what onnxruntime's GroupQueryAttention does with float32 memory (com.microsoft, operator contracts in
onnxruntime's ContribOperators.md): query float32 [B, S, heads * size], or all three projections packed, [B, S, (heads +
2 kv_heads) * size], without key and value; memory [B, kv_heads, capacity, size]; seqlens int32 [B], each row's length
with the new tokens, less 1; cos and sin [positions, half]: the first 2 * half numbers of a head are rotated, i with i +
half (Su et al., RoFormer, 2021). Present and past should be the same memory; where they are not, the past is copied.

Attributes: HEADS, KV_HEADS, HALF (0: nothing is rotated), WINDOW (positions that a query sees, 0: all), SCALE and
SOFTCAP (float32 as the integer of their bits).
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from edgelm.native.attention_kernels import CHUNK, emit_kernels
from edgelm.native.attention_part import emit_attend, emit_combine, part_length
from edgelm.native.attention_task import Task, emit_rotate, fields, past_of, tables_of
from edgelm.native.calling import Call
from edgelm.native.emitter import F32, I32, I64, POINTER, VOID, WIDE, Emitter
from edgelm.native.formats import ATTENTION_COMPUTE, COLUMNS, MOST_QUERIES, State
from edgelm.native.targets import Target


def emit_attention(module: ir.Module, target: Target) -> str:
    """Emit the operator; return the name of what computes it."""
    kernels = emit_kernels(module, target)
    rotate = emit_rotate(module)
    store, attend = _emit_store(module, rotate), emit_attend(module, kernels, rotate)
    combine = emit_combine(module, kernels)
    e = Emitter(module, ATTENTION_COMPUTE, VOID, [POINTER, POINTER], export=True)
    state, context = e.function.args
    b = e.b
    call = Call(e, state, context)
    task = e.reserve(I64, len(Task))

    def put(field: Task, value: ir.Value) -> None:
        e.store(value, task, field)

    query = call.input(0)
    put(Task.QUERY, call.data(query))
    past = [call.input(3), call.input(4)]
    for index, field in ((5, Task.SEQLENS), (6, Task.COS), (7, Task.SIN), (8, Task.POSITIONS)):
        put(field, call.optional(index))
    batch, tokens, width = call.dimensions(query, 3)
    _, kv_heads, capacity, size = shape = call.dimensions(past[0], 4)
    heads = e.load(state, State.HEADS, I64)
    own = b.mul(heads, size)
    y = call.output(0, [batch, tokens, own])
    put(Task.Y, y)
    presents = [call.output(index, shape) for index in (1, 2)]
    for field, present in zip((Task.PRESENT_KEY, Task.PRESENT_VALUE), presents, strict=True):
        put(field, present)
    is_packed = b.icmp_signed(">", width, own)
    of_keys = b.mul(kv_heads, size)
    key = b.select(is_packed, e.at(call.data(query), own, F32), call.optional(1))
    value = b.select(is_packed, e.at(call.data(query), b.add(own, of_keys), F32), call.optional(2))
    group = b.sdiv(heads, kv_heads)
    tile = e.larger(b.sdiv(e.const(MOST_QUERIES), group), e.const(1))
    tiles = b.sdiv(b.add(tokens, b.sub(tile, e.const(1))), tile)
    seqlens = call.data(call.input(5))
    with e.loop(e.const(0), batch, carried=[e.const(0)]) as (row, longest, kept):
        kept.append(e.larger(longest[0], b.sext(e.load(seqlens, row, I32), I64)))
    queries = b.mul(b.mul(batch, tokens), heads)
    is_short = b.icmp_signed("==", tiles, e.const(1))
    splits = b.select(is_short, b.add(b.sdiv(e.smaller(kept[0], capacity), e.const(CHUNK)), e.const(1)), e.const(1))
    parts = b.mul(b.mul(queries, splits), part_length(e, size))
    put(Task.PARTS, call.output(3, [b.select(b.icmp_signed(">", splits, e.const(1)), parts, e.const(1))]))
    for field, number in (
        (Task.KEY, key), (Task.VALUE, value), (Task.QUERY_STRIDE, width),
        (Task.KEY_STRIDE, b.select(is_packed, width, of_keys)), (Task.TOKENS, tokens), (Task.HEADS, heads),
        (Task.KV_HEADS, kv_heads), (Task.GROUP, group), (Task.SIZE, size), (Task.CAPACITY, capacity),
        (Task.SPLITS, splits), (Task.TILE, tile), (Task.TILES, tiles),
    ):  # fmt: skip
        put(field, number)
    for name in ("HALF", "WINDOW", "SCALE", "SOFTCAP"):
        put(Task[name], e.load(state, State[name], I64))
    for before, present in zip(past, presents, strict=True):
        _keep_past(e, call.data(before), present, shape)
    call.for_each(store, b.mul(batch, tokens), task)
    call.for_each(attend, b.mul(b.mul(b.mul(batch, kv_heads), tiles), splits), task)
    with b.if_then(b.icmp_signed(">", splits, e.const(1))):
        call.for_each(combine, queries, task)
    b.ret_void()
    return ATTENTION_COMPUTE


def _keep_past(e: Emitter, past: ir.Value, present: ir.Value, shape: Sequence[ir.Value]) -> None:
    """Emit a copy of the memory where it is not bound as past and present alike."""
    b = e.b
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(past, I64), b.ptrtoint(present, I64))):
        count = e.const(1)
        for dimension in shape:
            count = b.mul(count, dimension)
        with e.loop(e.const(0), count, COLUMNS) as (at, _, _):
            b.store(e.load_vector(past, at, F32, WIDE), e.at(present, at, F32), align=4)


def _emit_store(module: ir.Module, rotate: ir.Function) -> ir.Function:
    """Emit what writes the keys and values of token `index` of the batch into the memory."""
    e = Emitter(module, "attention_store", VOID, [POINTER, I64])
    task, index = e.function.args
    b = e.b
    key, value, stride, tokens, kv_heads, size, capacity, half = fields(
        e, task, Task.KEY, Task.VALUE, Task.KEY_STRIDE, Task.TOKENS, Task.KV_HEADS, Task.SIZE, Task.CAPACITY,
        Task.HALF,
    )  # fmt: skip
    presents = fields(e, task, Task.PRESENT_KEY, Task.PRESENT_VALUE)
    row = b.sdiv(index, tokens)
    position = b.add(past_of(e, task, row), b.srem(index, tokens))
    tables = tables_of(e, task, index, position)
    one = ir.Constant(F32, 1.0)
    with e.loop(e.const(0), kv_heads) as (head, _, _):
        source = b.add(b.mul(index, stride), b.mul(head, size))
        target = b.mul(b.add(b.mul(b.add(b.mul(row, kv_heads), head), capacity), position), size)
        for origin, present, turned in zip((key, value), presents, (half, e.const(0)), strict=True):
            b.call(rotate, [e.at(origin, source, F32), e.at(present, target, F32), *tables, turned, size, one])
    b.ret_void()
    return e.function
