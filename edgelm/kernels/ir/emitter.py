"""LLVM's builder with the types that the kernels work on, and the few things that they need more often than once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from llvmlite import ir

from edgelm.kernels.abi import PANEL_COLUMNS

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32: Final = ir.FloatType()
F16: Final = ir.HalfType()
POINTER: Final = ir.PointerType()
VOID: Final = ir.VoidType()
F32X16: Final = ir.VectorType(F32, PANEL_COLUMNS)
I32X16: Final = ir.VectorType(I32, PANEL_COLUMNS)
I8X64: Final = ir.VectorType(I8, 4 * PANEL_COLUMNS)


class Emitter:
    """A function that is being written; `b` is LLVM's builder."""

    def __init__(self, module: ir.Module, name: str, result: ir.Type, kinds: Sequence[ir.Type], export: bool = False):
        self.function = ir.Function(module, ir.FunctionType(result, kinds), name)
        self.function.attributes.add("nounwind")
        set.add(self.function.attributes, '"no-builtins"')  # no memset for a loop of stores: there is no C library
        if not export:
            self.function.linkage = "internal"
        self.b = ir.IRBuilder(self.function.append_basic_block())

    def const(self, value: int) -> ir.Constant:
        """Return a 64-bit integer."""
        return ir.Constant(I64, int(value))  # an enumeration's member prints its name in Python 3.10

    def alloca(self, ir_type: ir.Type, count: int = 1) -> ir.Value:
        """Return the address of elements on the stack."""
        place = self.b.alloca(ir_type, self.const(count))
        place.type = POINTER  # llvmlite gives it a type of its own, which stores of anything else do not fit
        return place

    def gep(self, pointer: ir.Value, index: ir.Value | int, ir_type: ir.Type) -> ir.Value:
        """Return the address of an element."""
        place = self.const(index) if isinstance(index, int) else index
        return self.b.gep(pointer, [place], inbounds=True, source_etype=ir_type)

    def load(self, pointer: ir.Value, index: ir.Value | int, ir_type: ir.Type, align: int | None = None) -> ir.Value:
        """Load an element."""
        return self.b.load(self.gep(pointer, index, ir_type), typ=ir_type, align=align)

    def load_vector(self, pointer: ir.Value, index: ir.Value | int, element: ir.Type, vector: ir.Type) -> ir.Value:
        """Load a vector that begins at an element; no alignment beyond a byte is assumed."""
        return self.b.load(self.gep(pointer, index, element), typ=vector, align=1)

    def store(self, value: ir.Value, pointer: ir.Value, index: ir.Value | int, align: int | None = None) -> None:
        """Store a value as an element of its own type."""
        self.b.store(value, self.gep(pointer, index, value.type), align=align)

    def splat(self, value: ir.Value, ir_type: ir.VectorType) -> ir.Value:
        """Return a vector of equal elements."""
        first = self.b.insert_element(ir.Constant(ir_type, ir.Undefined), value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, ir_type.count), [0] * ir_type.count)
        return self.b.shuffle_vector(first, ir.Constant(ir_type, ir.Undefined), zeros)

    def call_address(self, function: ir.Value, ir_type: ir.FunctionType, arguments: Sequence[ir.Value]) -> ir.Value:
        """Call a function by its address, a 64-bit integer."""
        return self.b.call(self.b.inttoptr(function, ir_type.as_pointer()), arguments)

    def fma(self, one: ir.Value, other: ir.Value, added: ir.Value) -> ir.Value:
        """Return one * other + added of vectors of float32, rounded once."""
        return self.intrinsic(f"llvm.fma.v{one.type.count}f32", one.type, one, other, added)

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
        updated: list[ir.Value] = []
        yield counter, list(values), updated
        further = self.const(step) if isinstance(step, int) else step
        counter.add_incoming(self.b.add(counter, further), self.b.block)
        for phi, value in zip(values, updated, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        updated[:] = values

    def tiled_loop(self, count: ir.Value, sizes: Sequence[int], body: Callable[[int, ir.Value], None]) -> None:
        """Pass `count` things, as many at once as the sizes allow, the largest first; the last size is 1.

        `body` is given how many there are and the first one's number, and writes the code for them.
        """
        done: ir.Value = self.const(0)
        for size in sizes:
            with self.loop(done, self.b.sub(count, self.const(size - 1)), size) as (first, _, _):
                body(size, first)
            left = self.b.srem(self.b.sub(count, done), self.const(size))
            done = self.b.sub(count, left)

    def smaller(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return the smaller of two integers."""
        return self.b.select(self.b.icmp_signed("<", one, other), one, other)

    def larger(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Return the larger of two integers."""
        return self.b.select(self.b.icmp_signed(">", one, other), one, other)
