"""The parameter block that the threads of attention share, and functions on one token: rotation, lengths, output."""

from __future__ import annotations

from enum import IntEnum

from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS
from edgelm.kernels.ir.emitter import F32, F32X16, I32, I64, POINTER, VOID, Emitter


class AttentionParam(IntEnum):
    """Fields of the parameter block that the threads share during one call, 64 bits each.

    Fields before QUERY_STRIDE are addresses, SCALE and SOFTCAP are float32, the others are integers.
    """

    QUERY = 0
    KEY = 1
    VALUE = 2
    PRESENT_KEY = 3
    PRESENT_VALUE = 4
    COS = 5
    SIN = 6
    POSITIONS = 7
    SEQLENS = 8
    Y = 9
    PARTS = 10
    QUERY_STRIDE = 11
    KEY_STRIDE = 12
    TOKENS = 13
    HEADS = 14
    KV_HEADS = 15
    GROUP = 16
    SIZE = 17
    CAPACITY = 18
    HALF = 19
    WINDOW = 20
    SPLITS = 21
    TILE = 22
    TILES = 23
    SCALE = 24
    SOFTCAP = 25


def load_params(e: Emitter, params: ir.Value, *fields: AttentionParam) -> list[ir.Value]:
    """Emit the loads of some fields of the parameter block."""
    values = []
    for field in fields:
        ir_type = F32 if field >= AttentionParam.SCALE else POINTER if field < AttentionParam.QUERY_STRIDE else I64
        values.append(e.b.load(e.gep(params, field, I64), typ=ir_type))
    return values


def emit_rotate(module: ir.Module) -> ir.Function:
    """Emit rotate(source, target, cos, sin, half, size, scale): rotates one head of a token and multiplies it by scale.

    source and target: float32 [size]; cos and sin: float32 [half]. Numbers from 2 * half on are not rotated.
    """
    e = Emitter(module, "attention_rotate", VOID, [POINTER, POINTER, POINTER, POINTER, I64, I64, F32])
    source, target, cos, sin, half, size, scale = e.function.args
    b = e.b
    wide = e.splat(scale, F32X16)
    whole = b.and_(half, e.const(-PANEL_COLUMNS))
    with e.loop(e.const(0), whole, PANEL_COLUMNS) as (at, _, _):
        pair = at, b.add(at, half)
        one, other = (e.load_vector(source, index, F32, F32X16) for index in pair)
        c, s = (e.load_vector(table, at, F32, F32X16) for table in (cos, sin))
        rotated = b.fsub(b.fmul(one, c), b.fmul(other, s)), b.fadd(b.fmul(other, c), b.fmul(one, s))
        for index, value in zip(pair, rotated, strict=True):
            b.store(b.fmul(value, wide), e.gep(target, index, F32), align=4)
    with e.loop(whole, half) as (at, _, _):
        pair = at, b.add(at, half)
        one, other = (e.load(source, index, F32) for index in pair)
        c, s = (e.load(table, at, F32) for table in (cos, sin))
        rotated = b.fsub(b.fmul(one, c), b.fmul(other, s)), b.fadd(b.fmul(other, c), b.fmul(one, s))
        for index, value in zip(pair, rotated, strict=True):
            e.store(b.fmul(value, scale), target, index)
    start = b.add(half, half)
    whole = b.add(start, b.and_(b.sub(size, start), e.const(-PANEL_COLUMNS)))
    with e.loop(start, whole, PANEL_COLUMNS) as (at, _, _):
        b.store(b.fmul(e.load_vector(source, at, F32, F32X16), wide), e.gep(target, at, F32), align=4)
    with e.loop(whole, size) as (at, _, _):
        e.store(b.fmul(e.load(source, at, F32), scale), target, at)
    b.ret_void()
    return e.function


def emit_past_length(e: Emitter, params: ir.Value, row: ir.Value) -> ir.Value:
    """Emit the number of past positions of a row of the batch, clamped so that the new tokens fit into the KV cache."""
    seqlens, tokens, capacity = load_params(
        e, params, AttentionParam.SEQLENS, AttentionParam.TOKENS, AttentionParam.CAPACITY
    )
    length = e.smaller(e.b.add(e.b.sext(e.load(seqlens, row, I32), I64), e.const(1)), capacity)
    return e.larger(e.b.sub(length, tokens), e.const(0))


def emit_rotary_row(e: Emitter, params: ir.Value, token: ir.Value, position: ir.Value) -> list[ir.Value]:
    """Emit the addresses of a token's cosines and sines.

    token: index of the token in the whole batch; position: its position if the input `positions` is absent.
    """
    b = e.b
    positions, half, *tables = load_params(
        e, params, AttentionParam.POSITIONS, AttentionParam.HALF, AttentionParam.COS, AttentionParam.SIN
    )
    before = b.block
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(positions, I64), e.const(0))):
        given = e.load(positions, token, I64)
        inside = b.block
    table_row = b.phi(I64)
    table_row.add_incoming(position, before)
    table_row.add_incoming(given, inside)
    return [e.gep(table, b.mul(table_row, half), F32) for table in tables]


def emit_output(e: Emitter, params: ir.Value, target: ir.Value, values: ir.Value, totals: ir.Value) -> None:
    """Emit the output of one query of a head: the weighted values divided by the sum of `totals`, float32 [16]."""
    b = e.b
    y, size = load_params(e, params, AttentionParam.Y, AttentionParam.SIZE)
    zero, all_totals = ir.Constant(F32, 0.0), e.load_vector(totals, 0, F32, F32X16)
    total = e.intrinsic("llvm.vector.reduce.fadd.v16f32", F32, zero, all_totals)
    wide = e.splat(b.fdiv(ir.Constant(F32, 1.0), total), F32X16)
    with e.loop(e.const(0), size, PANEL_COLUMNS) as (at, _, _):
        value = b.fmul(e.load_vector(values, at, F32, F32X16), wide)
        b.store(value, e.gep(y, b.add(b.mul(target, size), at), F32), align=4)
