"""What an operator asks of onnxruntime while it computes, as LLVM IR: inputs, outputs, threads.

What the functions return is null for arguments as these are, and not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llvmlite import ir

from edgelm.native.emitter import I64, POINTER, VOID, Emitter
from edgelm.native.formats import State

MOST_DIMENSIONS: Final = 8


class Call:
    """One call of an operator. `state` holds the functions (see `formats.State`), `context` is onnxruntime's."""

    def __init__(self, e: Emitter, state: ir.Value, context: ir.Value) -> None:
        self._e = e
        self._state = state
        self._context = context
        self._out = e.reserve(POINTER)
        self._rank = e.reserve(I64)
        self.shape = e.reserve(I64, MOST_DIMENSIONS)
        """The dimensions that were asked for last, to be changed for an output."""

    def input(self, index: int) -> ir.Value:
        """Emit the address of an input, null for one that is absent."""
        self._call(State.GET_INPUT, self._context, self._e.const(index), self._out)
        return self._result()

    def data(self, value: ir.Value) -> ir.Value:
        """Emit where a tensor's values begin."""
        self._call(State.GET_DATA, value, self._out)
        return self._result()

    def optional(self, index: int) -> ir.Value:
        """Emit where an input's values begin, null for one that is absent."""
        e, b = self._e, self._e.b
        value = self.input(index)
        before = b.block
        with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(value, I64), e.const(0))):
            data = self.data(value)
            inside = b.block
        found = b.phi(POINTER)
        found.add_incoming(ir.Constant(POINTER, None), before)
        found.add_incoming(data, inside)
        return found

    def rank(self, value: ir.Value) -> ir.Value:
        """Emit how many dimensions a tensor has; they are in `shape` then."""
        self._call(State.GET_SHAPE, value, self._out)
        info = self._result()
        self._call(State.GET_RANK, info, self._rank)
        rank = self._e.b.load(self._rank, typ=I64)
        self._call(State.GET_DIMENSIONS, info, self.shape, rank)
        release = self._e.load(self._state, State.RELEASE_SHAPE, I64)
        self._e.call_address(release, ir.FunctionType(VOID, [POINTER]), [info])
        return rank

    def dimensions(self, value: ir.Value, rank: int) -> list[ir.Value]:
        """Emit the dimensions of a tensor that has `rank` of them."""
        self.rank(value)
        return [self._e.load(self.shape, axis, I64) for axis in range(rank)]

    def output(self, index: int, dimensions: Sequence[ir.Value]) -> ir.Value:
        """Emit where the values of an output begin that has these dimensions."""
        for axis, size in enumerate(dimensions):
            self._e.store(size, self.shape, axis)
        return self.output_like_shape(index, self._e.const(len(dimensions)))

    def output_like_shape(self, index: int, rank: ir.Value) -> ir.Value:
        """Emit where the values of an output begin whose dimensions are in `shape`."""
        self._call(State.GET_OUTPUT, self._context, self._e.const(index), self.shape, rank, self._out)
        return self.data(self._result())

    def for_each(self, function: ir.Value, count: ir.Value, task: ir.Value) -> None:
        """Emit calls of function(task, i) for i in [0, count), by the threads where there is more than one."""
        e, b = self._e, self._e.b
        with b.if_else(b.icmp_signed("==", count, e.const(1))) as (then, otherwise):
            with then:
                kind = ir.FunctionType(VOID, [POINTER, I64])
                e.call_address(b.ptrtoint(function, I64), kind, [task, e.const(0)])
            with otherwise:
                self._call(State.PARALLEL_FOR, self._context, function, count, count, task)

    def _call(self, field: State, *arguments: ir.Value) -> None:
        kind = ir.FunctionType(POINTER, [value.type for value in arguments])
        self._e.call_address(self._e.load(self._state, field, I64), kind, arguments)

    def _result(self) -> ir.Value:
        return self._e.b.load(self._out, typ=POINTER)
