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

from edgelm.kernels.abi import ATTENTION_COMPUTE, COLUMNS, MOST_HEAD_SIZE, MOST_QUERIES, Fault, State
from edgelm.kernels.ir.attention_kernels import CHUNK, emit_kernels
from edgelm.kernels.ir.attention_params import Task, emit_rotate, fields, past_of, tables_of
from edgelm.kernels.ir.attention_tile import emit_attend, emit_combine, part_length
from edgelm.kernels.ir.emitter import F32, I32, I64, POINTER, VOID, WIDE, Emitter
from edgelm.kernels.ir.kernel_context import Call
from edgelm.kernels.ir.targets import Target


def emit_attention(module: ir.Module, target: Target) -> str:
    """Emit the operator; return the name of what computes it."""
    kernels = emit_kernels(module, target)
    rotate = emit_rotate(module)
    store, attend = _emit_store(module, rotate), emit_attend(module, kernels, rotate)
    combine = emit_combine(module, kernels)
    e = Emitter(module, ATTENTION_COMPUTE, POINTER, [POINTER, POINTER], export=True)
    state, context = e.function.args
    b = e.b
    call = Call(e, state, context)
    task = e.reserve(I64, len(Task))

    def put(field: Task, value: ir.Value) -> None:
        e.store(value, task, field)

    query, key, value, *past = (call.input(index) for index in range(5))
    others = [call.input(index) for index in range(5, 9)]
    put(Task.QUERY, call.data(query))
    for given, field in zip(others, (Task.SEQLENS, Task.COS, Task.SIN, Task.POSITIONS), strict=True):
        put(field, call.optional(given))
    batch, tokens, width = call.dimensions(query, 3)
    _, kv_heads, capacity, size = shape = call.dimensions(past[0], 4)
    heads = e.load(state, State.HEADS, I64)
    own, of_keys = b.mul(heads, size), b.mul(kv_heads, size)
    is_packed = b.icmp_signed(">", width, own)
    _require_memory(e, call, state, [batch, tokens, *shape], past)
    _require_projections(e, call, [batch, tokens, width, own, of_keys], [key, value])
    longest = _require_lengths(e, call, [batch, tokens, capacity], others[0])
    with b.if_then(b.icmp_signed(">", e.load(state, State.HALF, I64), e.const(0))):
        _require_tables(e, call, e.load(state, State.HALF, I64), [batch, tokens, size, longest], others[1:])
    y = call.output(0, [batch, tokens, own])
    put(Task.Y, y)
    presents = [call.output(index, shape) for index in (1, 2)]
    for field, present in zip((Task.PRESENT_KEY, Task.PRESENT_VALUE), presents, strict=True):
        put(field, present)
    packed = call.data(query)
    key = b.select(is_packed, e.at(packed, own, F32), call.optional(key))
    value = b.select(is_packed, e.at(packed, b.add(own, of_keys), F32), call.optional(value))
    group = b.sdiv(heads, kv_heads)
    tile = e.larger(b.sdiv(e.const(MOST_QUERIES), group), e.const(1))
    tiles = b.sdiv(b.add(tokens, b.sub(tile, e.const(1))), tile)
    queries = b.mul(b.mul(batch, tokens), heads)
    is_short = b.icmp_signed("==", tiles, e.const(1))
    splits = b.select(is_short, b.add(b.sdiv(longest, e.const(CHUNK)), e.const(1)), e.const(1))
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
    call.end()
    return ATTENTION_COMPUTE


def _require_memory(
    e: Emitter, call: Call, state: ir.Value, sizes: Sequence[ir.Value], past: Sequence[ir.Value]
) -> None:
    """Emit faults for memory that does not fit. sizes: batch, tokens, the four dimensions of the memory of keys."""
    b = e.b
    batch, tokens, rows, kv_heads, capacity, size = shape = list(sizes)
    keys = e.load(state, State.KV_HEADS, I64)
    values = call.dimensions(past[1], 4)
    pairs = zip(values, shape[2:], strict=True)
    call.require_equal(Fault.MEMORY, (rows, batch), (kv_heads, keys), *pairs)
    fits = b.icmp_signed("==", b.and_(size, e.const(COLUMNS - 1)), e.const(0))
    fits = b.and_(fits, b.icmp_signed(">", size, e.const(0)))
    call.require(b.and_(fits, b.icmp_signed("<=", size, e.const(MOST_HEAD_SIZE))), Fault.HEAD)
    call.require(b.icmp_signed("<=", tokens, capacity), Fault.TOKENS)


def _require_projections(e: Emitter, call: Call, sizes: Sequence[ir.Value], given: Sequence[ir.Value]) -> None:
    """Emit faults for queries, keys and values that do not fit.

    sizes: batch, tokens, the queries' last dimension, the widths of all heads and of those of keys. given: keys and
    values, null where they are packed behind the queries.
    """
    b = e.b
    batch, tokens, width, own, of_keys = sizes
    is_packed = b.icmp_signed(">", width, own)
    whole = b.select(is_packed, b.add(own, b.add(of_keys, of_keys)), own)
    call.require_equal(Fault.PROJECTIONS, (width, whole))
    with b.if_then(b.not_(is_packed)):
        for each in given:
            call.require(call.is_given(each), Fault.PROJECTIONS)
            shape = call.dimensions(each, 3)
            call.require_equal(Fault.PROJECTIONS, *zip(shape, (batch, tokens, of_keys), strict=True))


def _require_lengths(e: Emitter, call: Call, sizes: Sequence[ir.Value], seqlens: ir.Value) -> ir.Value:
    """Emit faults for lengths that do not fit, and the largest of them. sizes: batch, tokens, capacity."""
    b = e.b
    batch, tokens, capacity = sizes
    call.require_equal(Fault.LENGTHS, (call.count(seqlens), batch))
    lengths = call.data(seqlens)
    least = b.sub(tokens, e.const(1))
    start = [e.const(0), ir.Constant(ir.IntType(1), 1)]
    with e.loop(e.const(0), batch, carried=start) as (row, (longest, holds), kept):
        length = b.sext(e.load(lengths, row, I32), I64)
        fits = b.and_(b.icmp_signed(">=", length, least), b.icmp_signed("<", length, capacity))
        kept += [e.larger(longest, length), b.and_(holds, fits)]
    call.require(kept[1], Fault.LENGTHS)
    return kept[0]


def _require_tables(
    e: Emitter, call: Call, half: ir.Value, sizes: Sequence[ir.Value], given: Sequence[ir.Value]
) -> None:
    """Emit faults for rotary tables and positions that do not fit.

    sizes: batch, tokens, the size of a head, the largest position where none are given. given: cosines, sines,
    positions or null.
    """
    b = e.b
    batch, tokens, size, longest = sizes
    call.require(b.icmp_signed("<=", b.add(half, half), size), Fault.TABLES)
    rows = e.const(0)
    for number, table in enumerate(given[:2]):
        call.require(call.is_given(table), Fault.TABLES)
        height, width = call.dimensions(table, 2)
        call.require_equal(Fault.TABLES, (width, half), (height, rows if number else height))
        rows = height
    with b.if_else(call.is_given(given[2])) as (told, counted):
        with told:
            count = b.mul(batch, tokens)
            call.require_equal(Fault.POSITIONS, (call.count(given[2]), count))
            positions = call.data(given[2])
            with e.loop(e.const(0), count, carried=[ir.Constant(ir.IntType(1), 1)]) as (token, (holds,), kept):
                kept.append(b.and_(holds, b.icmp_unsigned("<", e.load(positions, token, I64), rows)))
            call.require(kept[0], Fault.POSITIONS)
        with counted:
            call.require(b.icmp_signed("<", longest, rows), Fault.TABLES)


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
