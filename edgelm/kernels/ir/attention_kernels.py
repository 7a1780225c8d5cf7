"""The kernels of attention, as LLVM IR: some queries of one KV head and one tile of positions at a time.

Each tile of positions has its own softmax, and tiles are merged one after the other (Milakov and Gimelshein, Online
normalizer calculation for softmax, 2018; Dao et al., FlashAttention, 2022). Sums are computed in an order that depends
only on the position: a query's result has the same bits for any batch, any division of the prompt, any number of
threads.

    qk_dot             some queries x keys -> scores
    online_softmax     scores of one query in a tile -> weights, their sum, the largest score
    rescale_factors    two largest scores -> factors for the sums of each when they are merged
    values             weights x values, merged with the sums
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS
from edgelm.kernels.ir.emitter import F32, F32X16, I32, I32X16, I64, POINTER, VOID, Emitter
from edgelm.kernels.ir.math_functions import exp, tanh
from edgelm.kernels.ir.targets import Target

KV_TILE: Final = 128
"""Positions of a tile. Tiles always begin at multiples of it, so that a query's result does not depend on others."""
MINUS_INFINITY: Final = float("-inf")
_KEYS_PER_STEP: Final = 4
"""Keys that are multiplied at once."""
_MAX_VALUE_VECTORS: Final = 4
"""Maximum number of vectors of a position's values that are read at once: a head of 64, the usual size."""


@dataclass(frozen=True, slots=True)
class AttentionKernels:
    """Functions of a module. `qk_dot` and `values` are by the number of queries that they compute at once."""

    qk_dot: dict[int, ir.Function]
    online_softmax: ir.Function
    rescale_factors: ir.Function
    values: dict[int, dict[int, ir.Function]]
    """By the number of vectors of 16 columns as well."""


def emit_attention_kernels(module: ir.Module, target: Target) -> AttentionKernels:
    """Emit the kernels for a kind of processor."""
    rows = target.query_tiles
    return AttentionKernels(
        {count: _emit_qk_dot(module, target, count) for count in rows},
        _emit_online_softmax(module),
        _emit_rescale_factors(module),
        {
            count: {
                across: _emit_values(module, count, across)
                for across in (min(target.max_accumulators // count, _MAX_VALUE_VECTORS), 1)
            }
            for count in rows
        },
    )


def _exchanged(b: ir.IRBuilder, one: ir.Value, other: ir.Value, step: int) -> list[ir.Value]:
    """Return two vectors: the lanes without bit `step` in their index of both, and the lanes with that bit."""
    count = one.type.count
    first = [lane if not lane & step else count + lane - step for lane in range(count)]
    second = [lane + step if not lane & step else count + lane for lane in range(count)]
    ir_type = ir.VectorType(I32, count)
    return [b.shuffle_vector(one, other, ir.Constant(ir_type, lanes)) for lanes in (first, second)]


def _emit_qk_dot(module: ir.Module, target: Target, rows: int) -> ir.Function:
    """Emit qk_dot(queries, size, keys, first, last, scores): 16 columns of scores, float32 [rows, KV_TILE].

    queries: float32 [rows, size]; keys: float32 [positions, size], read from position `first` on, and position `last`
    in place of later ones. A vector holds the sums of every `lanes`-th product; its lanes are added up in pairs,
    neighbours first.
    """
    e = Emitter(module, f"attention_dots_{rows}", VOID, [POINTER, I64, POINTER, I64, I64, POINTER])
    queries, size, keys, first, last, scores = e.function.args
    b, lanes = e.b, target.lanes
    vector = ir.VectorType(F32, lanes)
    zeros = ir.Constant(vector, [0.0] * lanes)
    for group in range(0, PANEL_COLUMNS, lanes):
        sums: list[list[ir.Value]] = [[] for _ in range(rows)]
        for some in range(group, group + lanes, _KEYS_PER_STEP):
            offsets = [b.mul(e.smaller(b.add(first, e.const(some + i)), last), size) for i in range(_KEYS_PER_STEP)]
            with e.loop(e.const(0), size, lanes, carried=[zeros] * (rows * _KEYS_PER_STEP)) as (at, so_far, updated):
                parts = [e.load_vector(keys, b.add(offset, at), F32, vector) for offset in offsets]
                for row in range(rows):
                    query = e.load_vector(queries, b.add(b.mul(size, e.const(row)), at), F32, vector)
                    updated += [e.fma(query, part, so_far[row * _KEYS_PER_STEP + i]) for i, part in enumerate(parts)]
            for row in range(rows):
                sums[row].append(_added(b, updated[row * _KEYS_PER_STEP : (row + 1) * _KEYS_PER_STEP], 1))
        for row, parts in enumerate(sums):
            b.store(_added(b, parts, _KEYS_PER_STEP), e.gep(scores, KV_TILE * row + group, F32), align=4)
    b.ret_void()
    return e.function


def _added(b: ir.IRBuilder, vectors: list[ir.Value], step: int) -> ir.Value:
    """Return a vector whose lanes are the sums of the lanes of the vectors, added in pairs from bit `step` on."""
    while len(vectors) > 1:
        pairs = [_exchanged(b, one, other, step) for one, other in zip(vectors[::2], vectors[1::2], strict=True)]
        vectors = [b.fadd(one, other) for one, other in pairs]
        step *= 2
    return vectors[0]


def _emit_online_softmax(module: ir.Module) -> ir.Function:
    """Emit online_softmax(scores, first, last, softcap, total) -> the largest score.

    scores: float32 [KV_TILE], replaced by the exponentials of their differences to the largest one, and by 0 outside
    [first, last]. softcap: c, with which a score s becomes c tanh(s / c) first; 0 for none. total: float32 [16], set to
    the sum of the exponentials in 16 parts.
    """
    e = Emitter(module, "attention_soften", F32, [POINTER, I64, I64, F32, POINTER])
    scores, first, last, softcap, total = e.function.args
    b = e.b
    nothing = ir.Constant(F32X16, [MINUS_INFINITY] * PANEL_COLUMNS)
    zeros = ir.Constant(F32X16, [0.0] * PANEL_COLUMNS)
    lanes = ir.Constant(I32X16, list(range(PANEL_COLUMNS)))
    first = e.smaller(e.larger(first, e.const(0)), e.const(KV_TILE))
    last = e.smaller(e.larger(last, e.const(-1)), e.const(KV_TILE - 1))
    end = b.add(last, e.const(1))
    begin = b.and_(first, e.const(-PANEL_COLUMNS))
    before, after = (e.splat(b.trunc(value, I32), I32X16) for value in (first, last))
    is_capped = b.fcmp_ordered("!=", softcap, ir.Constant(F32, 0.0))
    with b.if_then(is_capped):
        cap = e.splat(softcap, F32X16)
        with e.loop(begin, end, PANEL_COLUMNS) as (at, _, _):
            score = e.load_vector(scores, at, F32, F32X16)
            b.store(b.fmul(cap, tanh(e, b.fdiv(score, cap))), e.gep(scores, at, F32), align=4)
    with e.loop(begin, end, PANEL_COLUMNS, carried=[nothing]) as (at, maxima, updated):
        positions = b.add(e.splat(b.trunc(at, I32), I32X16), lanes)
        seen = b.and_(b.icmp_signed(">=", positions, before), b.icmp_signed("<=", positions, after))
        score = b.select(seen, e.load_vector(scores, at, F32, F32X16), nothing)
        b.store(score, e.gep(scores, at, F32), align=4)
        updated.append(b.select(b.fcmp_ordered(">", score, maxima[0]), score, maxima[0]))
    largest = e.intrinsic("llvm.vector.reduce.fmax.v16f32", F32, updated[0])
    bases = e.splat(_finite(b, largest), F32X16)
    with e.loop(begin, end, PANEL_COLUMNS, carried=[zeros]) as (at, sums, updated):
        score = e.load_vector(scores, at, F32, F32X16)
        power = exp(e, b.fsub(score, bases))
        power = b.select(b.fcmp_ordered("==", score, nothing), zeros, power)
        b.store(power, e.gep(scores, at, F32), align=4)
        updated.append(b.fadd(sums[0], power))
    b.store(updated[0], total, align=4)
    with e.loop(e.const(0), begin, PANEL_COLUMNS) as (at, _, _):
        b.store(zeros, e.gep(scores, at, F32), align=4)
    with e.loop(
        b.and_(b.add(end, e.const(PANEL_COLUMNS - 1)), e.const(-PANEL_COLUMNS)), e.const(KV_TILE), PANEL_COLUMNS
    ) as (at, _, _):
        b.store(zeros, e.gep(scores, at, F32), align=4)
    b.ret(largest)
    return e.function


def _finite(b: ir.IRBuilder, largest: ir.Value) -> ir.Value:
    """Return the largest score, or 0 if it is -infinity, because -infinity - (-infinity) is NaN."""
    is_empty = b.fcmp_ordered("==", largest, ir.Constant(F32, MINUS_INFINITY))
    return b.select(is_empty, ir.Constant(F32, 0.0), largest)


def _emit_rescale_factors(module: ir.Module) -> ir.Function:
    """Emit rescale_factors(so_far, here, factors) -> the larger of two largest scores.

    so_far and here: largest scores of the earlier tiles and of this one. factors: float32 [2], set to the factors with
    which the sums of each must be multiplied before they are added.
    """
    e = Emitter(module, "attention_weigh", F32, [F32, F32, POINTER])
    so_far, here, factors = e.function.args
    b = e.b
    largest = b.select(b.fcmp_ordered(">", here, so_far), here, so_far)
    both = e.splat(so_far, F32X16)
    for lane in range(1, PANEL_COLUMNS):
        both = b.insert_element(both, here, ir.Constant(I32, lane))
    powers = exp(e, b.fsub(both, e.splat(_finite(b, largest), F32X16)))
    for lane in (0, 1):
        e.store(b.extract_element(powers, ir.Constant(I32, lane)), factors, lane)
    b.ret(largest)
    return e.function


def rescale_and_add(e: Emitter, so_far: ir.Value, here: ir.Value, factors: Sequence[ir.Value]) -> ir.Value:
    """Emit the sum of two vectors, each multiplied with its factor from `rescale_factors`."""
    return e.fma(here, factors[1], e.b.fmul(so_far, factors[0]))


def _emit_values(module: ir.Module, rows: int, across: int) -> ir.Function:
    """Emit values(weights, values, stop, size, factors, sums) for 16 * across columns of some rows.

    weights: float32 [rows, KV_TILE]; values: float32 [positions, size], of which positions [0, stop) are added up and
    merged into the sums, float32 [rows, size]; factors: float32 [rows, 2], from `rescale_factors`.
    """
    name = f"attention_values_{rows}_{across}"
    e = Emitter(module, name, VOID, [POINTER, POINTER, I64, I64, POINTER, POINTER])
    weights, values, stop, size, factors, sums = e.function.args
    b = e.b
    zeros = ir.Constant(F32X16, [0.0] * PANEL_COLUMNS)
    with e.loop(e.const(0), stop, carried=[zeros] * (rows * across)) as (at, so_far, updated):
        offset = b.mul(at, size)
        parts = [e.load_vector(values, b.add(offset, e.const(PANEL_COLUMNS * i)), F32, F32X16) for i in range(across)]
        for row in range(rows):
            weight = e.splat(e.load(weights, b.add(at, e.const(KV_TILE * row)), F32), F32X16)
            updated += [e.fma(weight, part, so_far[row * across + i]) for i, part in enumerate(parts)]
    for row in range(rows):
        own = [e.splat(e.load(factors, 2 * row + i, F32), F32X16) for i in range(2)]
        for i in range(across):
            start = e.gep(sums, b.add(b.mul(size, e.const(row)), e.const(PANEL_COLUMNS * i)), F32)
            value = rescale_and_add(e, b.load(start, typ=F32X16, align=4), updated[row * across + i], own)
            b.store(value, start, align=4)
    b.ret_void()
    return e.function
