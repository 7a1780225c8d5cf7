"""The kernels that multiply quantized activations with quantized matrices, as LLVM IR: y = x W + bias + skip.

The weights lie in panels of 16 columns (see `rewrite.panel_layout`). Within a block the sums of products are exact, in
int32; sums of blocks are added up in float32, in the order of the blocks. So the result of a row does not depend on how
many rows are computed at once.

    panels     some rows of codes (see `activation_quantization`) x some panels -> y
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS, WeightFormat
from edgelm.kernels.ir.emitter import F16, F32, F32X16, I8, I8X64, I16, I32, I32X16, I64, POINTER, VOID, Emitter
from edgelm.kernels.ir.panel_decoder import load_codes, load_eight_codes
from edgelm.kernels.ir.targets import Target


@dataclass(frozen=True, slots=True)
class _ActivationRows:
    """Addresses of the codes, scales and zero-point terms of each row that a kernel computes at once."""

    codes: list[ir.Value]
    activation_scales: list[ir.Value]
    zero_point_terms: list[ir.Value]

    @property
    def count(self) -> int:
        return len(self.codes)


def emit_matmul_kernel(module: ir.Module, target: Target, fmt: WeightFormat, rows: int) -> ir.Function:
    """Emit the function that multiplies `rows` rows with panels [start, stop); its parameters are unpacked below.

    weights: codes in panels; scales: float16 [panels, blocks, 16]; codes, activation_scales and zero_point_terms: the
    quantized rows, one behind the other; bias: float32 [16 * panels] or null; skip: added to y, float32 [rows, columns]
    or null; y: float32 [rows, columns], of which the columns of panels [start, stop) are written.
    """
    kinds = [POINTER, POINTER, I64, I64, I64, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, I64]
    e = Emitter(module, f"panels_{fmt.bits}_{fmt.block_size}_{rows}", VOID, kinds)
    weights, scales, blocks, start, stop, codes, activation_scales, zero_point_terms, bias, skip, y, columns = (
        e.function.args
    )
    b = e.b
    width = b.mul(blocks, e.const(fmt.block_size))
    activations = _ActivationRows(
        [e.gep(codes, b.mul(width, e.const(fmt.code_bytes * row)), I8) for row in range(rows)],
        [e.gep(activation_scales, b.mul(blocks, e.const(row)), F32) for row in range(rows)],
        [e.gep(zero_point_terms, b.mul(blocks, e.const(row)), I32) for row in range(rows)],
    )
    zeros = ir.Constant(F32X16, [0.0] * PANEL_COLUMNS)
    with e.loop(start, stop) as (panel, _, _):
        passed = b.mul(panel, blocks)
        panel_weights = e.gep(weights, b.mul(passed, e.const(PANEL_COLUMNS * fmt.block_bytes)), I8)
        panel_scales = e.gep(scales, b.mul(passed, e.const(PANEL_COLUMNS)), F16)
        with e.loop(e.const(0), blocks, carried=[zeros] * rows) as (block, values, updated):
            sums = _block_sums(e, target, fmt, panel_weights, block, activations)
            at = b.mul(block, e.const(PANEL_COLUMNS))
            scale = b.fpext(e.load_vector(panel_scales, at, F16, ir.VectorType(F16, PANEL_COLUMNS)), F32X16)
            for row in range(rows):
                factor = b.fmul(scale, e.splat(e.load(activations.activation_scales[row], block, F32), F32X16))
                updated.append(e.intrinsic("llvm.fma.v16f32", F32X16, b.sitofp(sums[row], F32X16), factor, values[row]))
        first = b.mul(panel, e.const(PANEL_COLUMNS))
        results = _with_bias(e, updated, bias, first)
        begins = [b.add(b.mul(columns, e.const(row)), first) for row in range(rows)]
        added = b.icmp_unsigned("!=", b.ptrtoint(skip, I64), e.const(0))
        with b.if_else(added) as (then, otherwise):
            with then:
                _write(e, results, y, begins, b.sub(columns, first), skip)
            with otherwise:
                _write(e, results, y, begins, b.sub(columns, first))
    b.ret_void()
    return e.function


def _block_sums(
    e: Emitter, target: Target, fmt: WeightFormat, weights: ir.Value, block: ir.Value, rows: _ActivationRows
) -> list[ir.Value]:
    """Emit the sums of a block's products for each row, <16 x i32>; weights are decoded once for all rows."""
    b = e.b
    sums = [e.splat(e.load(rows.zero_point_terms[row], block, I32), I32X16) for row in range(rows.count)]
    here = e.gep(weights, b.mul(block, e.const(PANEL_COLUMNS * fmt.block_bytes)), I8)
    at = b.mul(block, e.const(fmt.block_size * fmt.code_bytes))
    if target.max_int16_sums(fmt.bits) and rows.count > 1:
        return _block_sums_by_pairs(e, target, fmt, here, [e.gep(codes, at, I8) for codes in rows.codes], sums)
    upper = [ir.Constant(I32X16, [0] * PANEL_COLUMNS)] * rows.count
    count = fmt.code_bytes  # 32-bit words for the codes of four activations
    max_sums = target.max_int16_sums(fmt.bits)
    pairs: list[ir.Value | None] = [None] * rows.count
    for fours, part in enumerate(load_codes(e, fmt, here, I8X64)):
        for row in range(rows.count):
            codes = e.gep(rows.codes[row], at, I8)
            spread = [_spread(e, codes, count * fours + i) for i in range(count)]
            if count == 2 and not target.has_signed_dot:
                sums[row] = target.dot_int16(b, sums[row], part, *spread)
                continue
            if max_sums:
                pairs[row] = target.multiply_pairs(b, pairs[row] if fours % max_sums else None, part, spread[0])
                if (fours + 1) % max_sums == 0 or 4 * (fours + 1) == fmt.block_size:
                    sums[row] = target.widen_pairs(b, sums[row], pairs[row])
                continue
            sums[row] = target.dot(b, sums[row], part, spread[0], fmt.bits)
            if count == 2:
                upper[row] = target.dot(b, upper[row], part, spread[1], fmt.bits)
    if count == 2 and target.has_signed_dot:
        eight = ir.Constant(I32X16, [8] * PANEL_COLUMNS)
        sums = [b.add(low, b.shl(high, eight)) for low, high in zip(sums, upper, strict=True)]
    return sums


def _block_sums_by_pairs(
    e: Emitter,
    target: Target,
    fmt: WeightFormat,
    here: ir.Value,
    codes: Sequence[ir.Value],
    sums: Sequence[ir.Value],
) -> list[ir.Value]:
    """Emit the sums of a block as `_block_sums`, adding products in int16 first, in loops that are not unrolled.

    If unrolled, LLVM computes a block row by row, with the weights on the stack: two loads of each weight for each row.
    In a loop the weights stay in registers (prefill of SmolLM2-135M on AVX2: 1.2 times as fast).
    """
    b = e.b
    eights = min(target.max_int16_sums(fmt.bits) // 2, fmt.block_size // 8)
    zeros = ir.Constant(ir.VectorType(I16, 2 * PANEL_COLUMNS), [0] * 2 * PANEL_COLUMNS)
    with e.loop(e.const(0), e.const(fmt.block_size // 8), eights, carried=sums) as (first, before, added):
        stop = b.add(first, e.const(eights))
        with e.loop(first, stop, carried=[zeros] * len(codes)) as (eight, pairs, updated):
            offset = b.mul(eight, e.const(8))
            for i, part in enumerate(load_eight_codes(e, fmt, here, eight)):
                for row, own in enumerate(codes):
                    pairs[row] = target.multiply_pairs(b, pairs[row], part, _spread(e, e.gep(own, offset, I8), i))
            updated.extend(pairs)
        added.extend(target.widen_pairs(b, total, more) for total, more in zip(before, updated, strict=True))
    return added


def _spread(e: Emitter, codes: ir.Value, fours: int) -> ir.Value:
    """Emit group `fours` of four codes, repeated for every column: <64 x i8>."""
    return e.b.bitcast(e.splat(e.load(codes, fours, I32, align=1), I32X16), I8X64)


def _with_bias(e: Emitter, values: Sequence[ir.Value], bias: ir.Value, first: ir.Value) -> list[ir.Value]:
    """Emit the addition of the panel's part of the bias, if the bias is not null."""
    b = e.b
    before = b.block
    with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(bias, I64), e.const(0))):
        part = e.load_vector(bias, first, F32, F32X16)
        added = [b.fadd(value, part) for value in values]
        inside = b.block
    results = []
    for plain, more in zip(values, added, strict=True):
        result = b.phi(F32X16)
        result.add_incoming(plain, before)
        result.add_incoming(more, inside)
        results.append(result)
    return results


def _write(
    e: Emitter,
    results: Sequence[ir.Value],
    y: ir.Value,
    begins: Sequence[ir.Value],
    rest: ir.Value,
    skip: ir.Value | None = None,
) -> None:
    """Emit the stores of a panel's columns; `rest` is the number of columns from the panel's first to the last."""
    b = e.b
    with b.if_else(b.icmp_signed(">=", rest, e.const(PANEL_COLUMNS)), likely=True) as (then, otherwise):
        with then:
            for begin, result in zip(begins, results, strict=True):
                more = result if skip is None else b.fadd(result, e.load_vector(skip, begin, F32, F32X16))
                b.store(more, e.gep(y, begin, F32), align=1)
        with otherwise, e.loop(e.const(0), rest) as (column, _, _):
            lane = b.trunc(column, I32)
            for begin, result in zip(begins, results, strict=True):
                one = b.extract_element(result, lane)
                index = b.add(begin, column)
                e.store(one if skip is None else b.fadd(one, e.load(skip, index, F32)), y, index)


def emit_matmul(module: ir.Module, target: Target, fmt: WeightFormat) -> Callable[[Emitter, Sequence[ir.Value]], None]:
    """Emit the kernels of a format; return a function that emits the calls of them for any number of rows.

    Its arguments are those of `emit_matmul_kernel`, after the number of rows.
    """
    kernels = {rows: emit_matmul_kernel(module, target, fmt, rows) for rows in target.row_tiles_for(fmt.bits)}

    def call(e: Emitter, arguments: Sequence[ir.Value]) -> None:
        (
            count,
            weights,
            scales,
            blocks,
            start,
            stop,
            codes,
            activation_scales,
            zero_point_terms,
            bias,
            skip,
            y,
            columns,
        ) = arguments
        is_added = e.b.icmp_unsigned("!=", e.b.ptrtoint(skip, I64), e.const(0))

        def part(rows: int, row: ir.Value) -> None:
            passed, before = e.b.mul(row, blocks), e.b.mul(row, columns)
            e.b.call(
                kernels[rows],
                [
                    weights, scales, blocks, start, stop,
                    e.gep(codes, e.b.mul(passed, e.const(fmt.block_size * fmt.code_bytes)), I8),
                    e.gep(activation_scales, passed, F32), e.gep(zero_point_terms, passed, I32), bias,
                    e.gep(skip, e.b.select(is_added, before, e.const(0)), F32), e.gep(y, before, F32), columns,
                ],
            )  # fmt: skip

        e.tiled_loop(count, target.row_tiles_for(fmt.bits), part)

    return call
