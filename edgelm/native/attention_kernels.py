"""The kernels of attention, as LLVM IR: some queries of one head of keys and values, a part of the positions at a time.

The scores of many queries are computed from keys that are turned first, 64 at once, so that a vector holds the scores
of 16 positions; those of a few are added up from vectors of products. What has been summed up is scaled down whenever a
larger score turns up (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al.,
FlashAttention, 2022).

    turn       keys of 64 positions -> [size, 64]
    scores     some queries x turned keys -> scores
    dots       some queries x keys as they lie -> scores
    soften     scores of one query -> weights, and by what the sums before shrink
    values     weights x values, added to the sums
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llvmlite import ir

from edgelm.native.elementary import exp, tanh
from edgelm.native.emitter import F32, I32, I64, POINTER, SUMS, VOID, WIDE, Emitter
from edgelm.native.formats import COLUMNS
from edgelm.native.targets import Target

CHUNK: Final = 128
"""Positions between two looks at the largest score. Parts of a sequence begin at multiples of it, whatever else is
computed, so that a sequence's result does not depend on its company."""
TURNED: Final = 64
"""Positions whose keys are turned together."""
MOST_DOTS: Final = 8
"""Queries up to which keys are not worth being turned."""
MINUS_INFINITY: Final = float("-inf")
_ACROSS: Final = TURNED // COLUMNS
_FEW: Final = 4
"""Keys that are multiplied at once."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """Functions of a module; those by the number of rows that they take at once."""

    turn: ir.Function
    scores: dict[int, ir.Function]
    dots: dict[int, ir.Function]
    soften: ir.Function
    values: dict[tuple[int, int], ir.Function]


def emit_kernels(module: ir.Module, target: Target) -> Kernels:
    """Emit the kernels for a kind of processor."""
    rows = target.attention_rows
    return Kernels(
        _emit_turn(module),
        {count: _emit_scores(module, count) for count in rows},
        {count: _emit_dots(module, count) for count in rows},
        _emit_soften(module),
        {(count, across): _emit_values(module, count, across) for count in rows for across in (_ACROSS, 1)},
    )


def _emit_turn(module: ir.Module) -> ir.Function:
    """Emit turn(keys, first, last, size, turned): keys [positions, size] from `first` on -> [size, 64].

    Positions behind `last` are taken to be it: they count for nothing later on, and may not be there.
    """
    e = Emitter(module, "attention_turn", VOID, [POINTER, I64, I64, I64, POINTER])
    keys, first, last, size, turned = e.function.args
    b = e.b
    with e.loop(e.const(0), e.const(TURNED), COLUMNS) as (group, _, _):
        start = b.add(first, group)
        places = [b.mul(e.smaller(b.add(start, e.const(i)), last), size) for i in range(COLUMNS)]
        with e.loop(e.const(0), size, COLUMNS) as (at, _, _):
            block = [e.load_vector(keys, b.add(place, at), F32, WIDE) for place in places]
            for i, vector in enumerate(_transposed(b, block)):
                place = b.add(b.mul(b.add(at, e.const(i)), e.const(TURNED)), group)
                b.store(vector, e.at(turned, place, F32), align=4)
    b.ret_void()
    return e.function


def _transposed(b: ir.IRBuilder, block: list[ir.Value]) -> list[ir.Value]:
    """Return the columns of 16 vectors (Eklundh's method: halves change places, then quarters, and so on)."""
    for step in (8, 4, 2, 1):
        for i in (i for i in range(COLUMNS) if not i & step):
            block[i], block[i + step] = _exchanged(b, block[i], block[i + step], step)
    return block


def _exchanged(b: ir.IRBuilder, one: ir.Value, other: ir.Value, step: int) -> list[ir.Value]:
    """Return two vectors whose lanes with and without `step` in their number changed places."""
    first = [lane if not lane & step else COLUMNS + lane - step for lane in range(COLUMNS)]
    second = [lane + step if not lane & step else COLUMNS + lane for lane in range(COLUMNS)]
    return [b.shuffle_vector(one, other, ir.Constant(SUMS, lanes)) for lanes in (first, second)]


def _emit_dots(module: ir.Module, rows: int) -> ir.Function:
    """Emit dots(queries, size, keys, first, last, scores): 16 columns of scores [rows, CHUNK], of keys as they lie.

    Queries [rows, size], keys [positions, size] from `first` on; positions behind `last` are taken to be it.
    """
    e = Emitter(module, f"attention_dots_{rows}", VOID, [POINTER, I64, POINTER, I64, I64, POINTER])
    queries, size, keys, first, last, scores = e.function.args
    b = e.b
    zeros = ir.Constant(WIDE, [0.0] * COLUMNS)
    sums: list[list[ir.Value]] = [[] for _ in range(rows)]
    for some in range(0, COLUMNS, _FEW):
        places = [b.mul(e.smaller(b.add(first, e.const(some + i)), last), size) for i in range(_FEW)]
        with e.loop(e.const(0), size, COLUMNS, carried=[zeros] * (rows * _FEW)) as (at, so_far, kept):
            parts = [e.load_vector(keys, b.add(place, at), F32, WIDE) for place in places]
            for row in range(rows):
                query = e.load_vector(queries, b.add(b.mul(size, e.const(row)), at), F32, WIDE)
                for i, part in enumerate(parts):
                    kept.append(e.intrinsic("llvm.fma.v16f32", WIDE, query, part, so_far[row * _FEW + i]))
        for row in range(rows):
            sums[row].append(_added(b, kept[row * _FEW : (row + 1) * _FEW], 1))
    for row, parts in enumerate(sums):
        b.store(_added(b, parts, _FEW), e.at(scores, CHUNK * row, F32), align=4)
    b.ret_void()
    return e.function


def _added(b: ir.IRBuilder, vectors: list[ir.Value], step: int) -> ir.Value:
    """Return a vector of sums: of vectors i * step, i = 0, 1, ..., the lanes whose numbers have those bits."""
    while len(vectors) > 1:
        pairs = [_exchanged(b, one, other, step) for one, other in zip(vectors[::2], vectors[1::2], strict=True)]
        vectors = [b.fadd(one, other) for one, other in pairs]
        step *= 2
    return vectors[0]


def _emit_scores(module: ir.Module, rows: int) -> ir.Function:
    """Emit scores(queries, size, turned, scores): queries [rows, size] -> 64 columns of scores [rows, CHUNK]."""
    e = Emitter(module, f"attention_scores_{rows}", VOID, [POINTER, I64, POINTER, POINTER])
    queries, size, turned, scores = e.function.args
    b = e.b
    zeros = ir.Constant(WIDE, [0.0] * COLUMNS)
    with e.loop(e.const(0), size, carried=[zeros] * (rows * _ACROSS)) as (at, sums, kept):
        keys = [e.load_vector(turned, b.add(b.mul(at, e.const(TURNED)), e.const(COLUMNS * i)), F32, WIDE)
                for i in range(_ACROSS)]  # fmt: skip
        for row in range(rows):
            query = e.splat(e.load(queries, b.add(b.mul(size, e.const(row)), at), F32), WIDE)
            for i, key in enumerate(keys):
                kept.append(e.intrinsic("llvm.fma.v16f32", WIDE, query, key, sums[row * _ACROSS + i]))
    for i, value in enumerate(kept):
        b.store(value, e.at(scores, CHUNK * (i // _ACROSS) + COLUMNS * (i % _ACROSS), F32), align=4)
    b.ret_void()
    return e.function


def _emit_soften(module: ir.Module) -> ir.Function:
    """Emit soften(scores, first, last, softcap, largest, total) -> by what the sums before are multiplied.

    scores: float32 [CHUNK], become the exponentials of their distance to the largest one so far; those outside
    [first, last] become 0. `softcap` c is 0 for none, else a score s becomes c tanh(s / c). largest: the largest score
    so far, total: 16 parts of the sum of exponentials; both are brought up to date.
    """
    e = Emitter(module, "attention_soften", F32, [POINTER, I64, I64, F32, POINTER, POINTER])
    scores, first, last, softcap, largest, total = e.function.args
    b = e.b
    nothing = ir.Constant(WIDE, [MINUS_INFINITY] * COLUMNS)
    zeros = ir.Constant(WIDE, [0.0] * COLUMNS)
    lanes = ir.Constant(SUMS, list(range(COLUMNS)))
    first = e.smaller(e.larger(first, e.const(0)), e.const(CHUNK))
    last = e.smaller(e.larger(last, e.const(-1)), e.const(CHUNK - 1))
    end = b.add(last, e.const(1))
    begin = b.and_(first, e.const(-COLUMNS))
    before, after = (e.splat(b.trunc(value, I32), SUMS) for value in (first, last))
    is_capped = b.fcmp_ordered("!=", softcap, ir.Constant(F32, 0.0))
    with b.if_then(is_capped):
        cap = e.splat(softcap, WIDE)
        with e.loop(begin, end, COLUMNS) as (at, _, _):
            score = e.load_vector(scores, at, F32, WIDE)
            b.store(b.fmul(cap, tanh(e, b.fdiv(score, cap))), e.at(scores, at, F32), align=4)
    with e.loop(begin, end, COLUMNS, carried=[nothing]) as (at, most, kept):
        places = b.add(e.splat(b.trunc(at, I32), SUMS), lanes)
        seen = b.and_(b.icmp_signed(">=", places, before), b.icmp_signed("<=", places, after))
        score = b.select(seen, e.load_vector(scores, at, F32, WIDE), nothing)
        b.store(score, e.at(scores, at, F32), align=4)
        kept.append(b.select(b.fcmp_ordered(">", score, most[0]), score, most[0]))
    old = b.load(largest, typ=F32)
    here = e.intrinsic("llvm.vector.reduce.fmax.v16f32", F32, kept[0])
    new = b.select(b.fcmp_ordered(">", here, old), here, old)
    b.store(new, largest)
    none = b.fcmp_ordered("==", new, ir.Constant(F32, MINUS_INFINITY))
    base = b.select(none, ir.Constant(F32, 0.0), new)
    factor = exp(e, e.splat(b.fsub(old, base), WIDE))
    bases = e.splat(base, WIDE)
    so_far = b.fmul(factor, e.load_vector(total, 0, F32, WIDE))
    with e.loop(begin, end, COLUMNS, carried=[so_far]) as (at, sums, kept):
        score = e.load_vector(scores, at, F32, WIDE)
        power = exp(e, b.fsub(score, bases))
        power = b.select(b.fcmp_ordered("==", score, nothing), zeros, power)
        b.store(power, e.at(scores, at, F32), align=4)
        kept.append(b.fadd(sums[0], power))
    b.store(kept[0], total, align=4)
    with e.loop(e.const(0), begin, COLUMNS) as (at, _, _):
        b.store(zeros, e.at(scores, at, F32), align=4)
    with e.loop(b.and_(b.add(end, e.const(COLUMNS - 1)), e.const(-COLUMNS)), e.const(CHUNK), COLUMNS) as (at, _, _):
        b.store(zeros, e.at(scores, at, F32), align=4)
    b.ret(b.extract_element(factor, ir.Constant(I32, 0)))
    return e.function


def _emit_values(module: ir.Module, rows: int, across: int) -> ir.Function:
    """Emit values(weights, values, first, stop, size, factors, sums) for 16 * across columns of some rows.

    weights: float32 [rows, CHUNK]; values: [positions, size], of which positions [first, stop) are added; factors:
    [rows], what the sums are multiplied with before; sums: [rows, size].
    """
    name = f"attention_values_{rows}_{across}"
    e = Emitter(module, name, VOID, [POINTER, POINTER, I64, I64, I64, POINTER, POINTER])
    weights, values, first, stop, size, factors, sums = e.function.args
    b = e.b
    starts = [b.add(b.mul(size, e.const(row)), e.const(COLUMNS * i)) for row in range(rows) for i in range(across)]
    scales = [e.splat(e.load(factors, row, F32), WIDE) for row in range(rows)]
    begun = [b.fmul(scales[i // across], e.load_vector(sums, start, F32, WIDE)) for i, start in enumerate(starts)]
    with e.loop(first, stop, carried=begun) as (at, so_far, kept):
        place = b.mul(at, size)
        parts = [e.load_vector(values, b.add(place, e.const(COLUMNS * i)), F32, WIDE) for i in range(across)]
        for row in range(rows):
            weight = e.splat(e.load(weights, b.add(at, e.const(CHUNK * row)), F32), WIDE)
            for i, part in enumerate(parts):
                kept.append(e.intrinsic("llvm.fma.v16f32", WIDE, weight, part, so_far[row * across + i]))
    for start, value in zip(starts, kept, strict=True):
        b.store(value, e.at(sums, start, F32), align=4)
    b.ret_void()
    return e.function
