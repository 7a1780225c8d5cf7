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

from edgelm.kernels.abi import (
    ATTENTION_SYMBOL,
    MAX_KERNEL_HEAD_SIZE,
    MAX_QUERY_TILE,
    PANEL_COLUMNS,
    InputErrorCode,
    StateField,
)
from edgelm.kernels.ir.attention_kernels import KV_TILE, emit_attention_kernels
from edgelm.kernels.ir.attention_params import (
    AttentionParam,
    emit_past_length,
    emit_rotary_row,
    emit_rotate,
    load_params,
)
from edgelm.kernels.ir.attention_tile import emit_attend, emit_combine, part_length
from edgelm.kernels.ir.emitter import F32, F32X16, I32, I64, POINTER, VOID, Emitter
from edgelm.kernels.ir.kernel_context import KernelContext
from edgelm.kernels.ir.targets import Target


def emit_attention(module: ir.Module, target: Target) -> str:
    """Emit the operator; return the name of what computes it."""
    kernels = emit_attention_kernels(module, target)
    rotate = emit_rotate(module)
    store, attend = _emit_store(module, rotate), emit_attend(module, kernels, rotate)
    combine = emit_combine(module, kernels)
    e = Emitter(module, ATTENTION_SYMBOL, POINTER, [POINTER, POINTER], export=True)
    state, context = e.function.args
    b = e.b
    ctx = KernelContext(e, state, context)
    params = e.alloca(I64, len(AttentionParam))

    def put(field: AttentionParam, value: ir.Value) -> None:
        e.store(value, params, field)

    query, key, value, *past = (ctx.input(index) for index in range(5))
    others = [ctx.input(index) for index in range(5, 9)]
    put(AttentionParam.QUERY, ctx.data(query))
    for given, field in zip(
        others, (AttentionParam.SEQLENS, AttentionParam.COS, AttentionParam.SIN, AttentionParam.POSITIONS), strict=True
    ):
        put(field, ctx.optional(given))
    batch, tokens, width = ctx.dimensions(query, 3)
    _, kv_heads, capacity, size = shape = ctx.dimensions(past[0], 4)
    heads = e.load(state, StateField.HEADS, I64)
    own, of_keys = b.mul(heads, size), b.mul(kv_heads, size)
    is_packed = b.icmp_signed(">", width, own)
    _require_memory(e, ctx, state, [batch, tokens, *shape], past)
    _require_projections(e, ctx, [batch, tokens, width, own, of_keys], [key, value])
    longest = _require_lengths(e, ctx, [batch, tokens, capacity], others[0])
    with b.if_then(b.icmp_signed(">", e.load(state, StateField.HALF, I64), e.const(0))):
        _require_tables(e, ctx, e.load(state, StateField.HALF, I64), [batch, tokens, size, longest], others[1:])
    y = ctx.output(0, [batch, tokens, own])
    put(AttentionParam.Y, y)
    presents = [ctx.output(index, shape) for index in (1, 2)]
    for field, present in zip((AttentionParam.PRESENT_KEY, AttentionParam.PRESENT_VALUE), presents, strict=True):
        put(field, present)
    packed = ctx.data(query)
    key = b.select(is_packed, e.gep(packed, own, F32), ctx.optional(key))
    value = b.select(is_packed, e.gep(packed, b.add(own, of_keys), F32), ctx.optional(value))
    group = b.sdiv(heads, kv_heads)
    tile = e.larger(b.sdiv(e.const(MAX_QUERY_TILE), group), e.const(1))
    tiles = b.sdiv(b.add(tokens, b.sub(tile, e.const(1))), tile)
    queries = b.mul(b.mul(batch, tokens), heads)
    is_short = b.icmp_signed("==", tiles, e.const(1))
    splits = b.select(is_short, b.add(b.sdiv(longest, e.const(KV_TILE)), e.const(1)), e.const(1))
    parts = b.mul(b.mul(queries, splits), part_length(e, size))
    put(AttentionParam.PARTS, ctx.output(3, [b.select(b.icmp_signed(">", splits, e.const(1)), parts, e.const(1))]))
    for field, number in (
        (AttentionParam.KEY, key),
        (AttentionParam.VALUE, value),
        (AttentionParam.QUERY_STRIDE, width),
        (AttentionParam.KEY_STRIDE, b.select(is_packed, width, of_keys)),
        (AttentionParam.TOKENS, tokens),
        (AttentionParam.HEADS, heads),
        (AttentionParam.KV_HEADS, kv_heads),
        (AttentionParam.GROUP, group),
        (AttentionParam.SIZE, size),
        (AttentionParam.CAPACITY, capacity),
        (AttentionParam.SPLITS, splits),
        (AttentionParam.TILE, tile),
        (AttentionParam.TILES, tiles),
    ):
        put(field, number)
    for name in ("HALF", "WINDOW", "SCALE", "SOFTCAP"):
        put(AttentionParam[name], e.load(state, StateField[name], I64))
    for before, present in zip(past, presents, strict=True):
        _keep_past(e, ctx.data(before), present, shape)
    ctx.parallel_for(store, b.mul(batch, tokens), params)
    ctx.parallel_for(attend, b.mul(b.mul(b.mul(batch, kv_heads), tiles), splits), params)
    with b.if_then(b.icmp_signed(">", splits, e.const(1))):
        ctx.parallel_for(combine, queries, params)
    ctx.end()
    return ATTENTION_SYMBOL


def _require_memory(
    e: Emitter, ctx: KernelContext, state: ir.Value, sizes: Sequence[ir.Value], past: Sequence[ir.Value]
) -> None:
    """Emit faults for memory that does not fit. sizes: batch, tokens, the four dimensions of the memory of keys."""
    b = e.b
    batch, tokens, rows, kv_heads, capacity, size = shape = list(sizes)
    keys = e.load(state, StateField.KV_HEADS, I64)
    values = ctx.dimensions(past[1], 4)
    pairs = zip(values, shape[2:], strict=True)
    ctx.require_equal(InputErrorCode.KV_CACHE, (rows, batch), (kv_heads, keys), *pairs)
    fits = b.icmp_signed("==", b.and_(size, e.const(PANEL_COLUMNS - 1)), e.const(0))
    fits = b.and_(fits, b.icmp_signed(">", size, e.const(0)))
    ctx.require(b.and_(fits, b.icmp_signed("<=", size, e.const(MAX_KERNEL_HEAD_SIZE))), InputErrorCode.HEAD)
    ctx.require(b.icmp_signed("<=", tokens, capacity), InputErrorCode.TOKENS)


def _require_projections(e: Emitter, ctx: KernelContext, sizes: Sequence[ir.Value], given: Sequence[ir.Value]) -> None:
    """Emit faults for queries, keys and values that do not fit.

    sizes: batch, tokens, the queries' last dimension, the widths of all heads and of those of keys. given: keys and
    values, null where they are packed behind the queries.
    """
    b = e.b
    batch, tokens, width, own, of_keys = sizes
    is_packed = b.icmp_signed(">", width, own)
    whole = b.select(is_packed, b.add(own, b.add(of_keys, of_keys)), own)
    ctx.require_equal(InputErrorCode.PROJECTIONS, (width, whole))
    with b.if_then(b.not_(is_packed)):
        for each in given:
            ctx.require(ctx.is_given(each), InputErrorCode.PROJECTIONS)
            shape = ctx.dimensions(each, 3)
            ctx.require_equal(InputErrorCode.PROJECTIONS, *zip(shape, (batch, tokens, of_keys), strict=True))


def _require_lengths(e: Emitter, ctx: KernelContext, sizes: Sequence[ir.Value], seqlens: ir.Value) -> ir.Value:
    """Emit faults for lengths that do not fit, and the largest of them. sizes: batch, tokens, capacity."""
    b = e.b
    batch, tokens, capacity = sizes
    ctx.require_equal(InputErrorCode.LENGTHS, (ctx.count(seqlens), batch))
    lengths = ctx.data(seqlens)
    least = b.sub(tokens, e.const(1))
    start = [e.const(0), ir.Constant(ir.IntType(1), 1)]
    with e.loop(e.const(0), batch, carried=start) as (row, (longest, holds), updated):
        length = b.sext(e.load(lengths, row, I32), I64)
        fits = b.and_(b.icmp_signed(">=", length, least), b.icmp_signed("<", length, capacity))
        updated += [e.larger(longest, length), b.and_(holds, fits)]
    ctx.require(updated[1], InputErrorCode.LENGTHS)
    return updated[0]


def _require_tables(
    e: Emitter, ctx: KernelContext, half: ir.Value, sizes: Sequence[ir.Value], given: Sequence[ir.Value]
) -> None:
    """Emit faults for rotary tables and positions that do not fit.

    sizes: batch, tokens, the size of a head, the largest position where none are given. given: cosines, sines,
    positions or null.
    """
    b = e.b
    batch, tokens, size, longest = sizes
    ctx.require(b.icmp_signed("<=", b.add(half, half), size), InputErrorCode.TABLES)
    rows = e.const(0)
    for number, table in enumerate(given[:2]):
        ctx.require(ctx.is_given(table), InputErrorCode.TABLES)
        height, width = ctx.dimensions(table, 2)
        ctx.require_equal(InputErrorCode.TABLES, (width, half), (height, rows if number else height))
        rows = height
    with b.if_else(ctx.is_given(given[2])) as (told, counted):
        with told:
            count = b.mul(batch, tokens)
            ctx.require_equal(InputErrorCode.POSITIONS, (ctx.count(given[2]), count))
            positions = ctx.data(given[2])
            with e.loop(e.const(0), count, carried=[ir.Constant(ir.IntType(1), 1)]) as (token, (holds,), updated):
                updated.append(b.and_(holds, b.icmp_unsigned("<", e.load(positions, token, I64), rows)))
            ctx.require(updated[0], InputErrorCode.POSITIONS)
        with counted:
            ctx.require(b.icmp_signed("<", longest, rows), InputErrorCode.TABLES)


def _keep_past(e: Emitter, past: ir.Value, present: ir.Value, shape: Sequence[ir.Value]) -> None:
    """Emit a copy of the memory where it is not bound as past and present alike."""
    b = e.b
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(past, I64), b.ptrtoint(present, I64))):
        count = e.const(1)
        for dimension in shape:
            count = b.mul(count, dimension)
        with e.loop(e.const(0), count, PANEL_COLUMNS) as (at, _, _):
            b.store(e.load_vector(past, at, F32, F32X16), e.gep(present, at, F32), align=4)


def _emit_store(module: ir.Module, rotate: ir.Function) -> ir.Function:
    """Emit what writes the keys and values of token `index` of the batch into the memory."""
    e = Emitter(module, "attention_store", VOID, [POINTER, I64])
    params, index = e.function.args
    b = e.b
    key, value, stride, tokens, kv_heads, size, capacity, half = load_params(
        e,
        params,
        AttentionParam.KEY,
        AttentionParam.VALUE,
        AttentionParam.KEY_STRIDE,
        AttentionParam.TOKENS,
        AttentionParam.KV_HEADS,
        AttentionParam.SIZE,
        AttentionParam.CAPACITY,
        AttentionParam.HALF,
    )
    presents = load_params(e, params, AttentionParam.PRESENT_KEY, AttentionParam.PRESENT_VALUE)
    row = b.sdiv(index, tokens)
    position = b.add(emit_past_length(e, params, row), b.srem(index, tokens))
    tables = emit_rotary_row(e, params, index, position)
    one = ir.Constant(F32, 1.0)
    with e.loop(e.const(0), kv_heads) as (head, _, _):
        source = b.add(b.mul(index, stride), b.mul(head, size))
        target = b.mul(b.add(b.mul(b.add(b.mul(row, kv_heads), head), capacity), position), size)
        for origin, present, turned in zip((key, value), presents, (half, e.const(0)), strict=True):
            b.call(rotate, [e.gep(origin, source, F32), e.gep(present, target, F32), *tables, turned, size, one])
    b.ret_void()
    return e.function
