"""The operator that reads rows of a table in panels, which a MatMul operator can share, as LLVM IR.

    Y = LookUpInt8Block32(indices)      attributes K, N, WEIGHTS, SCALES

indices: int64 [...], each in [-N, N), negative ones from the end; other values are clamped, so that nothing outside the
table is read. Y: float32 [..., K], K a multiple of the block size. Row n of the table is column n of the panels at the
offsets WEIGHTS and SCALES (see `rewrite.panel_layout`).
"""

from __future__ import annotations

from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS, StateField, WeightFormat
from edgelm.kernels.ir.emitter import F16, F32, I8, I32, I64, POINTER, Emitter
from edgelm.kernels.ir.kernel_context import MAX_RANK, KernelContext
from edgelm.kernels.ir.panel_decoder import load_codes

F32X4 = ir.VectorType(F32, 4)


def emit_gather(module: ir.Module, fmt: WeightFormat) -> None:
    """Emit the operator for tables of a format. Y is (code - 2^(bits-1)) * scale, in float32."""
    e = Emitter(module, fmt.gather_symbol, POINTER, [POINTER, POINTER], export=True)
    state, context = e.function.args
    b = e.b
    ctx = KernelContext(e, state, context)
    value = ctx.input(0)
    indices = ctx.data(value)
    rank = ctx.rank(value, MAX_RANK - 1)
    count = ctx.leading_elements(rank)
    size, columns, weights, scales = (
        e.load(state, field, I64) for field in (StateField.K, StateField.N, StateField.WEIGHTS, StateField.SCALES)
    )
    e.store(size, ctx.shape, rank)
    y = ctx.output_like_shape(0, b.add(rank, e.const(1)))
    blocks = b.sdiv(size, e.const(fmt.block_size))
    with e.loop(e.const(0), count) as (i, _, _):
        given = e.load(indices, i, I64)
        counted = b.select(b.icmp_signed("<", given, e.const(0)), b.add(given, columns), given)
        column = e.smaller(e.larger(counted, e.const(0)), b.sub(columns, e.const(1)))
        lane = b.and_(column, e.const(PANEL_COLUMNS - 1))
        before = b.mul(b.sdiv(column, e.const(PANEL_COLUMNS)), blocks)
        with e.loop(e.const(0), blocks) as (block, _, _):
            cell = b.mul(b.add(before, block), e.const(PANEL_COLUMNS))
            first = b.add(b.mul(cell, e.const(fmt.block_bytes)), b.mul(lane, e.const(4)))
            here = b.inttoptr(b.add(weights, first), POINTER)
            scale = e.load(b.inttoptr(scales, POINTER), b.add(cell, lane), F16)
            factor = e.splat(b.fpext(scale, F32), F32X4)
            to = b.add(b.mul(i, size), b.mul(block, e.const(fmt.block_size)))
            zero = ir.Constant(ir.VectorType(I32, 4), [1 << (fmt.bits - 1)] * 4)
            for four, part in enumerate(load_codes(e, fmt, here, ir.VectorType(I8, 4))):
                centred = b.sub(b.zext(part, zero.type), zero)
                values = b.fmul(b.sitofp(centred, F32X4), factor)
                b.store(values, e.gep(y, b.add(to, e.const(4 * four)), F32), align=1)
    ctx.end()
