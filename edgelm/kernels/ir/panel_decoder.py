"""Weights out of panels (see `packing`), as LLVM IR."""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS, WeightFormat
from edgelm.kernels.ir.emitter import I8, I8X64, I16, Emitter

_STRIDE = 4 * PANEL_COLUMNS
"""Bytes of a vector of all columns."""


def load_codes(e: Emitter, fmt: WeightFormat, here: ir.Value, ir_type: ir.VectorType) -> Iterator[ir.Value]:
    """Emit the codes of a block, unsigned, four of each column at a time, in their order.

    here: where the block begins, or the part of its first vector that belongs to some columns; kind: <4 n x i8> for n
    of them.
    """
    b = e.b
    if fmt.bits == 8:
        for at in range(0, fmt.block_size * PANEL_COLUMNS, _STRIDE):
            yield e.load_vector(here, at, I8, ir_type)
        return
    bits, at = fmt.high_bits, 0
    for eight in range(fmt.block_size // 8):
        if bits and eight % (4 // bits) == 0:
            high = e.load_vector(here, at, I8, ir_type)
            at += _STRIDE
        packed = e.load_vector(here, at, I8, ir_type)
        at += _STRIDE
        low = b.and_(packed, _bytes(ir_type, 15)), b.lshr(packed, _bytes(ir_type, 4))
        for half, part in enumerate(low):
            if not bits:
                yield part
            else:
                yield b.or_(part, _above(b, high, (2 * eight + half) * bits % 8, bits))


def eight_at(e: Emitter, fmt: WeightFormat, here: ir.Value, eight: ir.Value) -> list[ir.Value]:
    """Emit the codes that `load_codes` makes of eight weights a column, of less than 8 bits: two of <64 x i8>.

    here: where the block begins; eight: which of the block's eights, known at run time.
    """
    b, bits = e.b, fmt.high_bits
    at = eight
    if bits:  # every vector of high bits lies before the ones that it belongs to
        together = 4 // bits
        group = b.udiv(eight, e.const(together))
        at = b.add(at, b.add(group, e.const(1)))
    packed = e.load_vector(here, b.mul(at, e.const(_STRIDE)), I8, I8X64)
    low = [b.and_(packed, _bytes(I8X64, 15)), b.and_(_shifted(e, packed, e.const(4)), _bytes(I8X64, 15))]
    if not bits:
        return low
    high = e.load_vector(here, b.mul(group, e.const(_STRIDE * (1 + together))), I8, I8X64)
    high = _shifted(e, high, b.mul(b.urem(eight, e.const(together)), e.const(2 * bits)))
    return [b.or_(part, _above(b, high, half * bits, bits)) for half, part in enumerate(low)]


def _shifted(e: Emitter, value: ir.Value, bits: ir.Value) -> ir.Value:
    """Emit a shift to the right of 16 bits each: what crosses into a byte is for the caller to mask out."""
    words = ir.VectorType(I16, value.type.count // 2)
    return e.b.bitcast(e.b.lshr(e.b.bitcast(value, words), e.splat(e.b.trunc(bits, I16), words)), value.type)


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


def _bytes(ir_type: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(ir_type, [value] * ir_type.count)
