"""Weights out of panels (see `packing`), as LLVM IR."""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir

from edgelm.native.emitter import I8, I16, Emitter
from edgelm.native.formats import COLUMNS, Format

_STRIDE = 4 * COLUMNS
"""Bytes of a vector of all columns."""


def weights_of(e: Emitter, form: Format, here: ir.Value, kind: ir.VectorType) -> Iterator[ir.Value]:
    """Emit the codes of a block, unsigned, four of each column at a time, in their order.

    here: where the block begins, or the part of its first vector that belongs to some columns; kind: <4 n x i8> for n
    of them.
    """
    b = e.b
    if form.bits == 8:
        for at in range(0, form.block * COLUMNS, _STRIDE):
            yield e.load_vector(here, at, I8, kind)
        return
    bits, at = form.high_bits, 0
    for eight in range(form.block // 8):
        if bits and eight % (4 // bits) == 0:
            high = e.load_vector(here, at, I8, kind)
            at += _STRIDE
        packed = e.load_vector(here, at, I8, kind)
        at += _STRIDE
        low = b.and_(packed, _bytes(kind, 15)), b.lshr(packed, _bytes(kind, 4))
        for half, part in enumerate(low):
            if not bits:
                yield part
            else:
                yield b.or_(part, _above(b, high, (2 * eight + half) * bits % 8, bits))


def _above(b: ir.IRBuilder, high: ir.Value, first: int, bits: int) -> ir.Value:
    """Emit some bits of each byte, from bit `first` on, where the low 4 bits of a code leave room for them.

    Shifts are those of 16 bits, as x86 has none of bytes: what crosses from a byte into the next is masked out.
    """
    words = ir.VectorType(I16, high.type.count // 2)
    value = b.bitcast(high, words)
    if first > 4:
        value = b.lshr(value, ir.Constant(words, [first - 4] * words.count))
    elif first < 4:
        value = b.shl(value, ir.Constant(words, [4 - first] * words.count))
    return b.and_(b.bitcast(value, high.type), _bytes(high.type, ((1 << bits) - 1) << 4))


def _bytes(kind: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)
