"""A wrapper of LLVM's IR builder, with the vector types and loops that the kernels use. Knows no operator."""

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
    """A function under construction; `b` is LLVM's builder. Methods append instructions and return their values."""

    def __init__(self, module: ir.Module, name: str, result: ir.Type, kinds: Sequence[ir.Type], export: bool = False):
        self.function = ir.Function(module, ir.FunctionType(result, kinds), name)
        self.function.attributes.add("nounwind")
        set.add(self.function.attributes, '"no-builtins"')  # without it LLVM calls memset, which is not linked
        if not export:
            self.function.linkage = "internal"
        self.b = ir.IRBuilder(self.function.append_basic_block())

    def const(self, value: int) -> ir.Constant:
        """Return a 64-bit constant."""
        return ir.Constant(I64, int(value))  # in Python 3.10 an IntEnum member formats as its name

    def alloca(self, ir_type: ir.Type, count: int = 1) -> ir.Value:
        """Return the address of `count` elements on the stack."""
        address = self.b.alloca(ir_type, self.const(count))
        address.type = POINTER  # llvmlite uses a typed pointer, which allows stores of that type only
        return address

    def gep(self, pointer: ir.Value, index: ir.Value | int, ir_type: ir.Type) -> ir.Value:
        """Return the address of element `index` of an array of `ir_type`."""
        offset = self.const(index) if isinstance(index, int) else index
        return self.b.gep(pointer, [offset], inbounds=True, source_etype=ir_type)

    def load(self, pointer: ir.Value, index: ir.Value | int, ir_type: ir.Type, align: int | None = None) -> ir.Value:
        """Load element `index` of an array of `ir_type`."""
        return self.b.load(self.gep(pointer, index, ir_type), typ=ir_type, align=align)

    def load_vector(self, pointer: ir.Value, index: ir.Value | int, element: ir.Type, vector: ir.Type) -> ir.Value:
        """Load a vector that begins at element `index`, with any alignment."""
        return self.b.load(self.gep(pointer, index, element), typ=vector, align=1)

    def store(self, value: ir.Value, pointer: ir.Value, index: ir.Value | int, align: int | None = None) -> None:
        """Store a value as element `index` of an array of its type."""
        self.b.store(value, self.gep(pointer, index, value.type), align=align)

    def splat(self, value: ir.Value, ir_type: ir.VectorType) -> ir.Value:
        """Return a vector with all elements equal to a value."""
        first = self.b.insert_element(ir.Constant(ir_type, ir.Undefined), value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, ir_type.count), [0] * ir_type.count)
        return self.b.shuffle_vector(first, ir.Constant(ir_type, ir.Undefined), zeros)

    def call_address(self, function: ir.Value, ir_type: ir.FunctionType, arguments: Sequence[ir.Value]) -> ir.Value:
        """Call a function by its address, a 64-bit integer."""
        return self.b.call(self.b.inttoptr(function, ir_type.as_pointer()), arguments)

    def fma(self, one: ir.Value, other: ir.Value, added: ir.Value) -> ir.Value:
        """Return one * other + added of float32 vectors, rounded once."""
        return self.intrinsic(f"llvm.fma.v{one.type.count}f32", one.type, one, other, added)

    def intrinsic(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call an LLVM intrinsic."""
        module = self.b.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [value.type for value in arguments]), name)
        return self.b.call(function, arguments)

    @contextmanager
    def loop(
        self, start: ir.Value, stop: ir.Value, step: ir.Value | int = 1, carried: Sequence[ir.Value] = ()
    ) -> Iterator[tuple[ir.Value, list[ir.Value], list[ir.Value]]]:
        """Loop from `start` to below `stop`, possibly zero times; yield the counter, the carried values and a list.

        The body appends the updated carried values to the list. After the loop the list holds their final values.
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
        increment = self.const(step) if isinstance(step, int) else step
        counter.add_incoming(self.b.add(counter, increment), self.b.block)
        for phi, value in zip(values, updated, strict=True):
            phi.add_incoming(value, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        updated[:] = values

    def tiled_loop(self, count: ir.Value, sizes: Sequence[int], body: Callable[[int, ir.Value], None]) -> None:
        """Loop over `count` items in tiles of the given sizes, in descending order; the last size is 1.

        `body(size, first)` emits the code for a tile of `size` items that begins with item `first`.
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
