"""The tasks of attention that one thread computes: a tile of queries of one KV head and all or some of their positions.

If all queries of a row fit into one tile, the positions are split between tasks, and `emit_combine` merges the partial
results.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from edgelm.kernels.abi import MAX_KERNEL_HEAD_SIZE, MAX_QUERY_TILE, PANEL_COLUMNS
from edgelm.kernels.ir.attention_kernels import KV_TILE, MINUS_INFINITY, AttentionKernels, rescale_and_add
from edgelm.kernels.ir.attention_params import (
    AttentionParam,
    emit_output,
    emit_past_length,
    emit_rotary_row,
    load_params,
)
from edgelm.kernels.ir.emitter import F32, F32X16, I64, POINTER, VOID, Emitter


def emit_attend(module: ir.Module, kernels: AttentionKernels, rotate: ir.Function) -> ir.Function:
    """Emit the task that computes a tile of queries of one KV head, for one split of their positions or for all.

    Its index counts splits, then tiles, then KV heads, then rows of the batch.
    """
    e = Emitter(module, "attention_attend", VOID, [POINTER, I64])
    params, index = e.function.args
    b = e.b
    queries = e.alloca(F32, MAX_QUERY_TILE * MAX_KERNEL_HEAD_SIZE)
    scores = e.alloca(F32, MAX_QUERY_TILE * KV_TILE)
    sums = e.alloca(F32, MAX_QUERY_TILE * MAX_KERNEL_HEAD_SIZE)
    totals = e.alloca(F32, MAX_QUERY_TILE * PANEL_COLUMNS)
    running_max, factors = e.alloca(F32, MAX_QUERY_TILE), e.alloca(F32, 2 * MAX_QUERY_TILE)
    here_total = e.alloca(F32, PANEL_COLUMNS)
    query, stride, tokens, heads, kv_heads, group, size, capacity, half, window = load_params(
        e,
        params,
        AttentionParam.QUERY,
        AttentionParam.QUERY_STRIDE,
        AttentionParam.TOKENS,
        AttentionParam.HEADS,
        AttentionParam.KV_HEADS,
        AttentionParam.GROUP,
        AttentionParam.SIZE,
        AttentionParam.CAPACITY,
        AttentionParam.HALF,
        AttentionParam.WINDOW,
    )
    splits, tile, tiles, scale, softcap, all_keys, all_values = load_params(
        e,
        params,
        AttentionParam.SPLITS,
        AttentionParam.TILE,
        AttentionParam.TILES,
        AttentionParam.SCALE,
        AttentionParam.SOFTCAP,
        AttentionParam.PRESENT_KEY,
        AttentionParam.PRESENT_VALUE,
    )
    split, index = b.srem(index, splits), b.sdiv(index, splits)
    which, index = b.srem(index, tiles), b.sdiv(index, tiles)
    head, row = b.srem(index, kv_heads), b.sdiv(index, kv_heads)
    token = b.mul(which, tile)
    count = b.mul(e.smaller(tile, b.sub(tokens, token)), group)
    past = b.add(emit_past_length(e, params, row), token)
    first_head = b.mul(head, group)
    zeros = ir.Constant(F32X16, [0.0] * PANEL_COLUMNS)
    with e.loop(e.const(0), count) as (i, _, _):
        ahead = b.sdiv(i, group)
        token_index = b.add(b.mul(row, tokens), b.add(token, ahead))
        tables = emit_rotary_row(e, params, token_index, b.add(past, ahead))
        source = b.add(b.mul(token_index, stride), b.mul(b.add(first_head, b.srem(i, group)), size))
        target = e.gep(queries, b.mul(i, size), F32)
        b.call(rotate, [e.gep(query, source, F32), target, *tables, half, size, scale])
        e.store(ir.Constant(F32, MINUS_INFINITY), running_max, i)
        b.store(zeros, e.gep(totals, b.mul(i, e.const(PANEL_COLUMNS)), F32), align=4)
        with e.loop(e.const(0), size, PANEL_COLUMNS) as (at, _, _):
            b.store(zeros, e.gep(sums, b.add(b.mul(i, size), at), F32), align=4)
    last = b.add(past, b.sub(b.sdiv(count, group), e.const(1)))
    has_window = b.icmp_signed(">", window, e.const(0))
    unseen = b.select(has_window, e.larger(b.sub(b.add(past, e.const(1)), window), e.const(0)), e.const(0))
    is_split = b.icmp_signed(">", splits, e.const(1))
    begin = b.and_(unseen, e.const(-KV_TILE))
    begin = b.select(is_split, e.larger(begin, b.mul(split, e.const(KV_TILE))), begin)
    end = b.add(last, e.const(1))
    end = b.select(is_split, e.smaller(end, b.mul(b.add(split, e.const(1)), e.const(KV_TILE))), end)
    head_offset = b.mul(b.mul(b.add(b.mul(row, kv_heads), head), capacity), size)
    keys, values = (e.gep(each, head_offset, F32) for each in (all_keys, all_values))
    with e.loop(begin, end, KV_TILE) as (start, _, _):
        here = e.smaller(b.sub(end, start), e.const(KV_TILE))
        _score(e, kernels, count, [queries, size, keys, start, here, last, scores])
        with e.loop(e.const(0), count) as (i, _, _):
            tile_last = b.sub(b.add(past, b.sdiv(i, group)), start)
            tile_first = b.select(has_window, b.add(b.sub(tile_last, window), e.const(1)), e.const(0))
            own = e.gep(scores, b.mul(i, e.const(KV_TILE)), F32)
            tile_max = b.call(kernels.online_softmax, [own, tile_first, tile_last, softcap, here_total])
            both = e.gep(factors, b.mul(i, e.const(2)), F32)
            e.store(b.call(kernels.rescale_factors, [e.load(running_max, i, F32), tile_max, both]), running_max, i)
            _merge_totals(e, e.gep(totals, b.mul(i, e.const(PANEL_COLUMNS)), F32), here_total, both)
        first_value = e.gep(values, b.mul(start, size), F32)
        _add_values(e, kernels, count, [scores, first_value, here, size, factors, sums])
    with e.loop(e.const(0), count) as (i, _, _):
        total = e.gep(totals, b.mul(i, e.const(PANEL_COLUMNS)), F32)
        token_index = b.add(b.mul(row, tokens), b.add(token, b.sdiv(i, group)))
        target = b.add(b.mul(token_index, heads), b.add(first_head, b.srem(i, group)))
        own = e.gep(sums, b.mul(i, size), F32)
        with b.if_else(is_split) as (then, otherwise):
            with then:
                _emit_partial(e, params, b.add(b.mul(target, splits), split), e.load(running_max, i, F32), total, own)
            with otherwise:
                emit_output(e, params, target, own, total)
    b.ret_void()
    return e.function


def _score(e: Emitter, kernels: AttentionKernels, count: ir.Value, arguments: Sequence[ir.Value]) -> None:
    """Emit the scores of `count` queries for `here` positions from `start` on."""
    queries, size, keys, start, here, last, scores = arguments
    b = e.b
    with e.loop(e.const(0), here, PANEL_COLUMNS) as (some, _, _):

        def score(rows: int, i: ir.Value) -> None:
            target = e.gep(scores, b.add(b.mul(i, e.const(KV_TILE)), some), F32)
            b.call(
                kernels.qk_dot[rows],
                [e.gep(queries, b.mul(i, size), F32), size, keys, b.add(start, some), last, target],
            )

        e.tiled_loop(count, tuple(kernels.qk_dot), score)


def _add_values(e: Emitter, kernels: AttentionKernels, count: ir.Value, arguments: Sequence[ir.Value]) -> None:
    """Emit the weighted sums of values for `count` queries, in tiles of queries and of columns."""
    scores, values, here, size, factors, sums = arguments
    b = e.b

    def query_tile(rows: int, i: ir.Value) -> None:
        def column_tile(across: int, vector: ir.Value) -> None:
            column = b.mul(vector, e.const(PANEL_COLUMNS))
            b.call(
                kernels.values[rows][across],
                [
                    e.gep(scores, b.mul(i, e.const(KV_TILE)), F32),
                    e.gep(values, column, F32),
                    here,
                    size,
                    e.gep(factors, b.mul(i, e.const(2)), F32),
                    e.gep(sums, b.add(b.mul(i, size), column), F32),
                ],
            )

        e.tiled_loop(b.sdiv(size, e.const(PANEL_COLUMNS)), tuple(kernels.values[rows]), column_tile)

    e.tiled_loop(count, tuple(kernels.values), query_tile)


def _merge_totals(e: Emitter, totals: ir.Value, here: ir.Value, factors: ir.Value) -> None:
    """Emit the merging of a tile's sums of exponentials, float32 [16], into those of earlier tiles."""
    both = [e.splat(e.load(factors, i, F32), F32X16) for i in range(2)]
    so_far, added = (e.load_vector(each, 0, F32, F32X16) for each in (totals, here))
    e.b.store(rescale_and_add(e, so_far, added, both), totals, align=4)


def _emit_partial(
    e: Emitter, params: ir.Value, index: ir.Value, running_max: ir.Value, total: ir.Value, values: ir.Value
) -> None:
    """Emit the stores of a partial result: weighted values, sums of exponentials, largest score."""
    b = e.b
    parts, size = load_params(e, params, AttentionParam.PARTS, AttentionParam.SIZE)
    part = e.gep(parts, b.mul(index, part_length(e, size)), F32)
    with e.loop(e.const(0), size, PANEL_COLUMNS) as (at, _, _):
        b.store(e.load_vector(values, at, F32, F32X16), e.gep(part, at, F32), align=4)
    b.store(e.load_vector(total, 0, F32, F32X16), e.gep(part, size, F32), align=4)
    e.store(running_max, part, b.add(size, e.const(PANEL_COLUMNS)))


def emit_combine(module: ir.Module, kernels: AttentionKernels) -> ir.Function:
    """Emit the task that merges the partial results of one query; its index counts heads, then tokens of the batch."""
    e = Emitter(module, "attention_combine", VOID, [POINTER, I64])
    params, index = e.function.args
    b = e.b
    parts, size, splits = load_params(e, params, AttentionParam.PARTS, AttentionParam.SIZE, AttentionParam.SPLITS)
    length = part_length(e, size)
    own = e.gep(parts, b.mul(b.mul(index, splits), length), F32)
    sums, factors = e.alloca(F32, MAX_KERNEL_HEAD_SIZE + PANEL_COLUMNS), e.alloca(F32, 2)
    all_sums = b.add(size, e.const(PANEL_COLUMNS))
    zeros = ir.Constant(F32X16, [0.0] * PANEL_COLUMNS)
    with e.loop(e.const(0), all_sums, PANEL_COLUMNS) as (at, _, _):
        b.store(zeros, e.gep(sums, at, F32), align=4)
    with e.loop(e.const(0), splits, carried=[ir.Constant(F32, MINUS_INFINITY)]) as (split, running_max, updated):
        part = e.gep(own, b.mul(split, length), F32)
        new = b.call(kernels.rescale_factors, [running_max[0], e.load(part, all_sums, F32), factors])
        both = [e.splat(e.load(factors, i, F32), F32X16) for i in range(2)]
        with e.loop(e.const(0), all_sums, PANEL_COLUMNS) as (at, _, _):
            so_far, here = (e.load_vector(each, at, F32, F32X16) for each in (sums, part))
            b.store(rescale_and_add(e, so_far, here, both), e.gep(sums, at, F32), align=4)
        updated.append(new)
    emit_output(e, params, index, sums, e.gep(sums, size, F32))
    b.ret_void()
    return e.function


def part_length(e: Emitter, size: ir.Value) -> ir.Value:
    """Emit the length of a partial result: weighted values [size], sums of exponentials [16], the largest score."""
    return e.b.add(size, e.const(PANEL_COLUMNS + 1))
