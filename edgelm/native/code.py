"""Code of the kernels as LLVM IR: y = x W + bias for weights of 4 or 8 bits in blocks that share a scale.

The weights lie in panels of 16 columns (see `packing`). Activations are rounded to 8 bits, a scale for each block of a
row, as onnxruntime's MatMulNBits does at accuracy level 4; sums of products are exact in 32 bits within a block and
added up in float32, in the order of the blocks. A row's result does not depend on how many rows are computed with it.

    quantize   a row of x, or of gates and values -> codes int8 [blocks * block], scales float32 [blocks],
               offsets int32 [blocks]
    panels     some rows of codes x some panels -> y
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
from llvmlite import ir

from edgelm.native.formats import COLUMNS, Format
from edgelm.native.targets import I8, I32, Target

I1, I64, F32 = ir.IntType(1), ir.IntType(64), ir.FloatType()
HALF: Final = ir.HalfType()
POINTER: Final = ir.PointerType()
VOID: Final = ir.VoidType()
WIDE: Final = ir.VectorType(F32, COLUMNS)
SUMS: Final = ir.VectorType(I32, COLUMNS)
BYTES: Final = ir.VectorType(I8, 4 * COLUMNS)
LEAST: Final = float(np.float32(1e-30))
"""Activations that are all smaller count as 0: beyond, a scale's inverse would overflow."""


class Emitter:
    """LLVM's builder with the few things that the kernels need more often than once."""

    def __init__(self, module: ir.Module, name: str, result: ir.Type, kinds: Sequence[ir.Type], export: bool = False):
        self.function = ir.Function(module, ir.FunctionType(result, kinds), name)
        self.function.attributes.add("nounwind")
        if not export:
            self.function.linkage = "internal"
        self.b = ir.IRBuilder(self.function.append_basic_block())

    def const(self, value: int) -> ir.Constant:
        """Return a 64-bit integer."""
        return ir.Constant(I64, int(value))  # an enumeration's member prints its name in Python 3.10

    def reserve(self, kind: ir.Type, count: int = 1) -> ir.Value:
        """Return the address of elements on the stack."""
        place = self.b.alloca(kind, self.const(count))
        place.type = POINTER  # llvmlite gives it a type of its own, which stores of anything else do not fit
        return place

    def at(self, pointer: ir.Value, index: ir.Value | int, kind: ir.Type) -> ir.Value:
        """Return the address of an element."""
        place = self.const(index) if isinstance(index, int) else index
        return self.b.gep(pointer, [place], inbounds=True, source_etype=kind)

    def load(self, pointer: ir.Value, index: ir.Value | int, kind: ir.Type, align: int | None = None) -> ir.Value:
        """Load an element."""
        return self.b.load(self.at(pointer, index, kind), typ=kind, align=align)

    def load_vector(self, pointer: ir.Value, index: ir.Value | int, element: ir.Type, vector: ir.Type) -> ir.Value:
        """Load a vector that begins at an element; no alignment beyond a byte is assumed."""
        return self.b.load(self.at(pointer, index, element), typ=vector, align=1)

    def store(self, value: ir.Value, pointer: ir.Value, index: ir.Value | int, align: int | None = None) -> None:
        """Store a value as an element of its own type."""
        self.b.store(value, self.at(pointer, index, value.type), align=align)

    def splat(self, value: ir.Value, kind: ir.VectorType) -> ir.Value:
        """Return a vector of equal elements."""
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def intrinsic(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call one of LLVM's functions."""
        module = self.b.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [value.type for value in arguments]), name)
        return self.b.call(function, arguments)

    @contextmanager
    def loop(
        self, start: ir.Value, stop: ir.Value, step: ir.Value | int = 1, carried: Sequence[ir.Value] = ()
    ) -> Iterator[tuple[ir.Value, list[ir.Value], list[ir.Value]]]:
        """Count from `start` to below `stop`, perhaps never; yield the counter, the carried values and a list.

        The body puts what it carries on into the list, which holds the values after the loop once it has ended.
        """
        before = self.b.block
        head, body, after = (self.function.append_basic_block() for _ in range(3))
        self.b.branch(head)
        self.b.position_at_end(head)
        counter = self.b.phi(I64)
        counter.add_incoming(start, before)
        values = [self.b.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        self.b.cbranch(self.b.icmp_signed("<", counter, stop), body, after)
        self.b.position_at_end(body)
        kept: list[ir.Value] = []
        yield counter, list(values), kept
        further = self.const(step) if isinstance(step, int) else step
        counter.add_incoming(self.b.add(counter, further), self.b.block)
        for phi, value in zip(values, kept, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        kept[:] = values

    def smaller(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return the smaller of two integers."""
        return self.b.select(self.b.icmp_signed("<", one, other), one, other)


def emit_quantize(module: ir.Module, target: Target, form: Format, gated: bool) -> ir.Function:
    """Emit quantize(x, size, blocks, codes, scales, offsets): one row of activations.

    `gated` rows are twice as long, gates and values: what is quantized is silu(gate) * value (SwiGLU; Shazeer, GLU
    Variants Improve Transformer, 2020). Blocks of zeros have codes 0. Offsets are what the weights' zero point
    adds to a sum, with its sign changed.
    """
    name = f"quantize_{form.bits}_{form.block}_{'gated' if gated else 'plain'}"
    e = Emitter(module, name, VOID, [POINTER, I64, I64, POINTER, POINTER, POINTER])
    x, size, blocks, codes, scales, offsets = e.function.args
    b, zero = e.b, ir.Constant(F32, 0.0)
    sources = [x, e.at(x, size, F32)] if gated else [x]
    padded = [e.reserve(F32, form.block) for _ in sources]
    with e.loop(e.const(0), blocks) as (block, _, _):
        first = b.mul(block, e.const(form.block))
        rest = b.sub(size, first)
        short = b.icmp_signed("<", rest, e.const(form.block))
        with b.if_then(short, likely=False), e.loop(e.const(0), e.const(form.block)) as (i, _, _):
            inside = b.icmp_signed("<", i, rest)
            place = b.select(inside, b.add(first, i), e.const(0))
            for source, copy in zip(sources, padded, strict=True):
                e.store(b.select(inside, e.load(source, place, F32), zero), copy, i)
        here = [b.select(short, copy, e.at(x, first, F32)) for x, copy in zip(sources, padded, strict=True)]
        parts = []
        for at in range(0, form.block, COLUMNS):
            part = e.load_vector(here[0], at, F32, WIDE)
            parts.append(b.fmul(_silu(e, part), e.load_vector(here[1], at, F32, WIDE)) if gated else part)
        sizes = [e.intrinsic("llvm.fabs.v16f32", WIDE, part) for part in parts]
        while len(sizes) > 1:
            sizes = [_larger(b, one, two) for one, two in zip(sizes[::2], sizes[1::2], strict=True)]
        largest = e.intrinsic("llvm.vector.reduce.fmax.v16f32", F32, sizes[0])
        most = ir.Constant(F32, 127.0)
        inverse = b.select(b.fcmp_ordered(">", largest, ir.Constant(F32, LEAST)), b.fdiv(most, largest), zero)
        factor = e.splat(inverse, WIDE)
        total = ir.Constant(SUMS, [0] * COLUMNS)
        for i, part in enumerate(parts):
            rounded = b.fptosi(e.intrinsic("llvm.rint.v16f32", WIDE, b.fmul(part, factor)), SUMS)
            total = b.add(total, rounded)
            narrow = b.trunc(rounded, ir.VectorType(I8, COLUMNS))
            b.store(narrow, e.at(codes, b.add(first, e.const(i * COLUMNS)), I8), align=1)
        e.store(b.fdiv(largest, most), scales, block)
        whole = e.intrinsic("llvm.vector.reduce.add.v16i32", I32, total)
        e.store(b.mul(whole, ir.Constant(I32, -target.zero_point(form.bits))), offsets, block)
    b.ret_void()
    return e.function


def _silu(e: Emitter, x: ir.Value) -> ir.Value:
    """Emit x / (1 + exp(-x)). The exponential is Cephes' expf: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]."""
    b = e.b

    def number(value: float) -> ir.Constant:
        return ir.Constant(WIDE, [float(np.float32(value))] * COLUMNS)

    def fma(*arguments: ir.Value) -> ir.Value:
        return e.intrinsic("llvm.fma.v16f32", WIDE, *arguments)

    y = b.fneg(x)
    for limit, sign in ((88.0, "<"), (-87.0, ">")):  # where the exponential is a normal number
        y = b.select(b.fcmp_ordered(sign, y, number(limit)), y, number(limit))
    power = e.intrinsic("llvm.rint.v16f32", WIDE, b.fmul(y, number(1.44269504088896341)))
    rest = fma(power, number(-0.693359375), y)
    rest = fma(power, number(2.12194440e-4), rest)
    value = number(1.9875691500e-4)
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = fma(value, rest, number(term))
    value = b.fadd(fma(b.fmul(rest, rest), value, rest), number(1.0))
    exponent = b.shl(
        b.add(b.fptosi(power, SUMS), ir.Constant(SUMS, [127] * COLUMNS)), ir.Constant(SUMS, [23] * COLUMNS)
    )
    exponential = b.fmul(value, b.bitcast(exponent, WIDE))
    return b.fdiv(x, b.fadd(exponential, number(1.0)))


def _larger(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", one, other), one, other)


def emit_panels(module: ir.Module, target: Target, form: Format, rows: int) -> ir.Function:
    """Emit panels(weights, scales, blocks, start, stop, codes, factors, offsets, bias, y, columns) for some rows.

    weights: panels as `packing` lays them out; scales: float16 [panels, blocks, 16]; codes, factors and offsets: what
    `quantize` made of the rows, one behind the other; y: float32 [rows, columns], of which the columns of panels
    [start, stop) are written; bias: float32 [16 * panels] or null.
    """
    name = f"panels_{form.bits}_{form.block}_{rows}"
    kinds = [POINTER, POINTER, I64, I64, I64, POINTER, POINTER, POINTER, POINTER, POINTER, I64]
    e = Emitter(module, name, VOID, kinds)
    weights, scales, blocks, start, stop, codes, factors, offsets, bias, y, columns = e.function.args
    b = e.b
    per_load = 8 if form.bits == 4 else 4
    loads = form.block // per_load
    width = b.mul(blocks, e.const(form.block))
    zeros = ir.Constant(WIDE, [0.0] * COLUMNS)
    rows_codes = [e.at(codes, b.mul(width, e.const(m)), I8) for m in range(rows)]
    rows_factors = [e.at(factors, b.mul(blocks, e.const(m)), F32) for m in range(rows)]
    rows_offsets = [e.at(offsets, b.mul(blocks, e.const(m)), I32) for m in range(rows)]
    with e.loop(start, stop) as (panel, _, _):
        index = b.mul(panel, blocks)
        panel_weights = e.at(weights, b.mul(index, e.const(64 * loads)), I8)
        panel_scales = e.at(scales, b.mul(index, e.const(COLUMNS)), HALF)
        with e.loop(e.const(0), blocks, carried=[zeros] * rows) as (block, values, kept):
            sums = [e.splat(e.load(rows_offsets[m], block, I32), SUMS) for m in range(rows)]
            here = e.at(panel_weights, b.mul(block, e.const(64 * loads)), I8)
            at = b.mul(block, e.const(form.block))
            for i in range(loads):
                packed = e.load_vector(here, 64 * i, I8, BYTES)
                halves = _nibbles(b, packed) if form.bits == 4 else [packed]
                for h, half in enumerate(halves):
                    for m in range(rows):
                        four = e.load(e.at(rows_codes[m], at, I8), i * len(halves) + h, I32, align=1)
                        spread = b.bitcast(e.splat(four, SUMS), BYTES)
                        sums[m] = target.dot(b, sums[m], half, spread, form.bits)
            scale = b.fpext(
                e.load_vector(panel_scales, b.mul(block, e.const(COLUMNS)), HALF, ir.VectorType(HALF, COLUMNS)), WIDE
            )
            for m in range(rows):
                factor = b.fmul(scale, e.splat(e.load(rows_factors[m], block, F32), WIDE))
                kept.append(e.intrinsic("llvm.fma.v16f32", WIDE, b.sitofp(sums[m], WIDE), factor, values[m]))
        first = b.mul(panel, e.const(COLUMNS))
        results = kept
        biased = b.icmp_unsigned("!=", b.ptrtoint(bias, I64), e.const(0))
        with b.if_else(biased) as (then, otherwise):
            with then:
                more = e.load_vector(bias, first, F32, WIDE)
                added = [b.fadd(value, more) for value in results]
                then_block = b.block
            with otherwise:
                otherwise_block = b.block
        for m in range(rows):
            result = b.phi(WIDE)
            result.add_incoming(added[m], then_block)
            result.add_incoming(results[m], otherwise_block)
            results[m] = result
        rest = b.sub(columns, first)
        whole = b.icmp_signed(">=", rest, e.const(COLUMNS))
        places = [e.at(y, b.add(b.mul(columns, e.const(m)), first), F32) for m in range(rows)]
        with b.if_else(whole, likely=True) as (then, otherwise):
            with then:
                for place, result in zip(places, results, strict=True):
                    b.store(result, place, align=1)
            with otherwise, e.loop(e.const(0), rest) as (i, _, _):
                lane = b.trunc(i, I32)
                for place, result in zip(places, results, strict=True):
                    e.store(b.extract_element(result, lane), place, i)
    b.ret_void()
    return e.function


def _nibbles(b: ir.IRBuilder, packed: ir.Value) -> list[ir.Value]:
    low = b.and_(packed, ir.Constant(BYTES, [15] * BYTES.count))
    return [low, b.lshr(packed, ir.Constant(BYTES, [4] * BYTES.count))]


def emit_rows(module: ir.Module, target: Target, form: Format) -> Callable[[Emitter, Sequence[ir.Value]], None]:
    """Emit the kernels of a format; return what emits a call of them for any number of rows.

    It takes the arguments of `emit_panels` with the number of rows in front.
    """
    kernels = {rows: emit_panels(module, target, form, rows) for rows in target.rows}

    def call(e: Emitter, arguments: Sequence[ir.Value]) -> None:
        count, weights, scales, blocks, start, stop, codes, factors, offsets, bias, y, columns = arguments
        done: ir.Value = e.const(0)
        for rows in target.rows:
            stop_row = e.b.sub(count, e.const(rows - 1))
            with e.loop(done, stop_row, rows) as (row, _, _):
                passed = e.b.mul(row, blocks)
                e.b.call(
                    kernels[rows],
                    [
                        weights, scales, blocks, start, stop,
                        e.at(codes, e.b.mul(passed, e.const(form.block)), I8),
                        e.at(factors, passed, F32), e.at(offsets, passed, I32),
                        bias, e.at(y, e.b.mul(row, columns), F32), columns,
                    ],
                )  # fmt: skip
            left = e.b.srem(e.b.sub(count, done), e.const(rows))
            done = e.b.sub(count, left)

    return call
