"""Decodes the codes of weights from panels (see `rewrite.panel_layout`), as LLVM IR."""

from __future__ import annotations

from collections.abc import Iterator

from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS, WeightFormat
from edgelm.kernels.ir.emitter import I8, I8X64, I16, Emitter

_STRIDE = 4 * PANEL_COLUMNS
"""Bytes of a vector with four bytes for each column of a panel."""


def load_codes(e: Emitter, fmt: WeightFormat, here: ir.Value, ir_type: ir.VectorType) -> Iterator[ir.Value]:
    """Emit the codes of a block, unsigned, in order; yield four of each column at a time.

    here: the address of the block, or of the bytes in its first vector that belong to the first of n columns. ir_type:
    <4 n x i8> for n columns.
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


def load_eight_codes(e: Emitter, fmt: WeightFormat, here: ir.Value, eight: ir.Value) -> list[ir.Value]:
    """Emit eight codes of each column, of less than 8 bits each, as `load_codes` yields them: two of <64 x i8>.

    here: the address of the block; eight: the index of the group of eight in the block, known at run time.
    """
    b, bits = e.b, fmt.high_bits
    at = eight
    if bits:  # each vector of high bits lies in front of the vectors of low bits that it belongs to
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
    """Emit a right shift of 16-bit words; the caller must mask out the bits that move from one byte to the other."""
    words = ir.VectorType(I16, value.type.count // 2)
    return e.b.bitcast(e.b.lshr(e.b.bitcast(value, words), e.splat(e.b.trunc(bits, I16), words)), value.type)


def _above(b: ir.IRBuilder, high: ir.Value, first: int, bits: int) -> ir.Value:
    """Emit `bits` bits of each byte, from bit `first` on, moved to bit 4: above the low 4 bits of a code.

    Shifts are of 16-bit words, because x86 has no byte shifts; bits that move to the other byte are masked out.
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
