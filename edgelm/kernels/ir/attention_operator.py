"""The attention operator, as LLVM IR.

    Y, present_key, present_value, scratch = Attention(query, key?, value?, past_key, past_value, seqlens, cos?, sin?,
                                                       positions?)

It computes the same as onnxruntime's GroupQueryAttention with a float32 KV cache (com.microsoft, ContribOperators.md):
query: float32 [B, S, heads * size], or all three projections packed, [B, S, (heads + 2 kv_heads) * size], without key
and value; past and present: float32 [B, kv_heads, capacity, size]; seqlens: int32 [B], each row's length with the new
tokens, minus 1; cos and sin: float32 [positions, half]: the first 2 * half numbers of a head are rotated, number i with
i + half (Su et al., RoFormer, 2021). Present and past should be bound to the same memory; if not, the past is copied.

Attributes: HEADS, KV_HEADS, HALF (0: no rotation), WINDOW (number of positions that a query attends to, 0: all), SCALE
and SOFTCAP (bits of a float32 as an integer).
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
    """Emit the operator; return the symbol of its function."""
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
    _require_kv_cache(e, ctx, state, [batch, tokens, *shape], past)
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
        _copy_past(e, ctx.data(before), present, shape)
    ctx.parallel_for(store, b.mul(batch, tokens), params)
    ctx.parallel_for(attend, b.mul(b.mul(b.mul(batch, kv_heads), tiles), splits), params)
    with b.if_then(b.icmp_signed(">", splits, e.const(1))):
        ctx.parallel_for(combine, queries, params)
    ctx.end()
    return ATTENTION_SYMBOL


def _require_kv_cache(
    e: Emitter, ctx: KernelContext, state: ir.Value, sizes: Sequence[ir.Value], past: Sequence[ir.Value]
) -> None:
    """Emit the return of an error if the shape of the KV cache is invalid.

    sizes: batch, tokens, the four dimensions of past_key.
    """
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
    """Emit the return of an error if the shapes of queries, keys and values are invalid.

    sizes: batch, tokens, last dimension of query, widths of all query heads and of all KV heads. given: keys and
    values, null if they are packed behind the queries.
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
    """Emit the return of an error if a length is out of range; return the largest. sizes: batch, tokens, capacity."""
    b = e.b
    batch, tokens, capacity = sizes
    ctx.require_equal(InputErrorCode.LENGTHS, (ctx.count(seqlens), batch))
    lengths = ctx.data(seqlens)
    minimum = b.sub(tokens, e.const(1))
    start = [e.const(0), ir.Constant(ir.IntType(1), 1)]
    with e.loop(e.const(0), batch, carried=start) as (row, (longest, are_valid), updated):
        length = b.sext(e.load(lengths, row, I32), I64)
        is_valid = b.and_(b.icmp_signed(">=", length, minimum), b.icmp_signed("<", length, capacity))
        updated += [e.larger(longest, length), b.and_(are_valid, is_valid)]
    ctx.require(updated[1], InputErrorCode.LENGTHS)
    return updated[0]


def _require_tables(
    e: Emitter, ctx: KernelContext, half: ir.Value, sizes: Sequence[ir.Value], given: Sequence[ir.Value]
) -> None:
    """Emit the return of an error if the rotary tables or the positions are invalid.

    sizes: batch, tokens, head size, largest position if no positions are given. given: cosines, sines, positions or
    null.
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
    with b.if_else(ctx.is_given(given[2])) as (has_positions, otherwise):
        with has_positions:
            count = b.mul(batch, tokens)
            ctx.require_equal(InputErrorCode.POSITIONS, (ctx.count(given[2]), count))
            positions = ctx.data(given[2])
            with e.loop(e.const(0), count, carried=[ir.Constant(ir.IntType(1), 1)]) as (token, (are_valid,), updated):
                updated.append(b.and_(are_valid, b.icmp_unsigned("<", e.load(positions, token, I64), rows)))
            ctx.require(updated[0], InputErrorCode.POSITIONS)
        with otherwise:
            ctx.require(b.icmp_signed("<", longest, rows), InputErrorCode.TABLES)


def _copy_past(e: Emitter, past: ir.Value, present: ir.Value, shape: Sequence[ir.Value]) -> None:
    """Emit a copy of the past to the present, if they are not the same memory."""
    b = e.b
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(past, I64), b.ptrtoint(present, I64))):
        count = e.const(1)
        for dimension in shape:
            count = b.mul(count, dimension)
        with e.loop(e.const(0), count, PANEL_COLUMNS) as (at, _, _):
            b.store(e.load_vector(past, at, F32, F32X16), e.gep(present, at, F32), align=4)


def _emit_store(module: ir.Module, rotate: ir.Function) -> ir.Function:
    """Emit the task that rotates the keys of one token of the batch and stores its keys and values in the KV cache."""
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
