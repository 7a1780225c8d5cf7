"""The operator that looks rows up in a table whose panels a product multiplies with as well, as LLVM IR.

    Y = LookUpInt8Block32(indices)      attributes K, N, WEIGHTS, SCALES

indices: int64 [...], each in [-N, N), negative ones from the end; others count as the nearest one, so that nothing
beside the table is read. Y: float32 [..., K], K a multiple of the block. Row n of the table is column n of the panels
that WEIGHTS and SCALES are places of (see `packing`).
"""

from __future__ import annotations

from llvmlite import ir

from edgelm.kernels.abi import COLUMNS, Format, State
from edgelm.kernels.ir.emitter import F32, HALF, I8, I32, I64, POINTER, Emitter
from edgelm.kernels.ir.kernel_context import MOST_DIMENSIONS, Call
from edgelm.kernels.ir.panel_decoder import weights_of

FOUR = ir.VectorType(F32, 4)


def emit_look_up(module: ir.Module, form: Format) -> None:
    """Emit the operator for tables of a format. Gives (code - 2^(bits-1)) * scale, in float32."""
    e = Emitter(module, form.look_up, POINTER, [POINTER, POINTER], export=True)
    state, context = e.function.args
    b = e.b
    call = Call(e, state, context)
    value = call.input(0)
    indices = call.data(value)
    rank = call.rank(value, MOST_DIMENSIONS - 1)
    count = call.product(rank)
    size, columns, weights, scales = (
        e.load(state, field, I64) for field in (State.K, State.N, State.WEIGHTS, State.SCALES)
    )
    e.store(size, call.shape, rank)
    y = call.output_like_shape(0, b.add(rank, e.const(1)))
    blocks = b.sdiv(size, e.const(form.block))
    with e.loop(e.const(0), count) as (i, _, _):
        given = e.load(indices, i, I64)
        counted = b.select(b.icmp_signed("<", given, e.const(0)), b.add(given, columns), given)
        column = e.smaller(e.larger(counted, e.const(0)), b.sub(columns, e.const(1)))
        lane = b.and_(column, e.const(COLUMNS - 1))
        before = b.mul(b.sdiv(column, e.const(COLUMNS)), blocks)
        with e.loop(e.const(0), blocks) as (block, _, _):
            place = b.mul(b.add(before, block), e.const(COLUMNS))
            first = b.add(b.mul(place, e.const(form.block_bytes)), b.mul(lane, e.const(4)))
            here = b.inttoptr(b.add(weights, first), POINTER)
            scale = e.load(b.inttoptr(scales, POINTER), b.add(place, lane), HALF)
            factor = e.splat(b.fpext(scale, F32), FOUR)
            to = b.add(b.mul(i, size), b.mul(block, e.const(form.block)))
            zero = ir.Constant(ir.VectorType(I32, 4), [1 << (form.bits - 1)] * 4)
            for four, part in enumerate(weights_of(e, form, here, ir.VectorType(I8, 4))):
                centred = b.sub(b.zext(part, zero.type), zero)
                values = b.fmul(b.sitofp(centred, FOUR), factor)
                b.store(values, e.at(y, b.add(to, e.const(4 * four)), F32), align=1)
    call.end()
