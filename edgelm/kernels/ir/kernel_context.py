"""Calls of onnxruntime's C API inside an operator, as LLVM IR: inputs, outputs, shapes, threads.

Every function of onnxruntime returns a status, null for success; the operator returns any other status at once. It also
returns a status if its inputs are invalid (see `InputErrorCode`): an operator checks all shapes before it reads or
writes a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llvmlite import ir

from edgelm.kernels.abi import InputErrorCode, StateField
from edgelm.kernels.ir.emitter import I64, POINTER, VOID, Emitter

MAX_RANK: Final = 8
_INVALID_ARGUMENT: Final = 2
"""OrtErrorCode."""


class KernelContext:
    """The context of one call of an operator, whose function returns an OrtStatus.

    `state` is the address of the node's state (see `abi.StateField`), `context` the OrtKernelContext.
    """

    def __init__(self, e: Emitter, state: ir.Value, context: ir.Value) -> None:
        self._e = e
        self._state = state
        self._context = context
        self._out = e.alloca(POINTER)
        self._rank = e.alloca(I64)
        self.shape = e.alloca(I64, MAX_RANK)
        """The dimensions that were read last, int64 [MAX_RANK]; callers change them for an output."""

    def end(self) -> None:
        """Emit the return of success."""
        self._e.b.ret(ir.Constant(POINTER, None))

    def require(self, condition: ir.Value, error: InputErrorCode) -> None:
        """Emit the return of an error if a condition, one bit, is false."""
        e, b = self._e, self._e.b
        with b.if_then(b.not_(condition), likely=False):
            text = e.load(e.b.inttoptr(e.load(self._state, StateField.ERROR_MESSAGES, I64), POINTER), error, POINTER)
            ir_type = ir.FunctionType(POINTER, [ir.IntType(32), POINTER])
            code = ir.Constant(ir.IntType(32), _INVALID_ARGUMENT)
            b.ret(e.call_address(e.load(self._state, StateField.CREATE_STATUS, I64), ir_type, [code, text]))

    def require_equal(self, error: InputErrorCode, *pairs: tuple[ir.Value, ir.Value]) -> None:
        """Emit the return of an error if the two integers of any pair differ."""
        are_equal: ir.Value = ir.Constant(ir.IntType(1), 1)
        for one, other in pairs:
            are_equal = self._e.b.and_(are_equal, self._e.b.icmp_signed("==", one, other))
        self.require(are_equal, error)

    def input(self, index: int) -> ir.Value:
        """Emit the OrtValue of an input, null if the input is absent."""
        self._call(StateField.GET_INPUT, self._context, self._e.const(index), self._out)
        return self._result()

    def is_given(self, value: ir.Value) -> ir.Value:
        """Emit whether an address is not null."""
        return self._e.b.icmp_unsigned("!=", self._e.b.ptrtoint(value, I64), self._e.const(0))

    def data(self, value: ir.Value) -> ir.Value:
        """Emit the address of a tensor's values."""
        self._call(StateField.GET_DATA, value, self._out)
        return self._result()

    def optional(self, value: ir.Value) -> ir.Value:
        """Emit the address of an input's values, null if the input is absent."""
        b = self._e.b
        before = b.block
        with b.if_then(self.is_given(value)):
            data = self.data(value)
            inside = b.block
        found = b.phi(POINTER)
        found.add_incoming(ir.Constant(POINTER, None), before)
        found.add_incoming(data, inside)
        return found

    def rank(self, value: ir.Value, max_rank: int = MAX_RANK) -> ir.Value:
        """Emit the rank of a tensor, at most `max_rank`, and store its dimensions in `shape`."""
        e = self._e
        self._call(StateField.GET_SHAPE, value, self._out)
        info = self._result()
        self._call(StateField.GET_RANK, info, self._rank)
        rank = e.b.load(self._rank, typ=I64)
        self._call(StateField.GET_DIMENSIONS, info, self.shape, e.smaller(rank, e.const(MAX_RANK)))
        release = e.load(self._state, StateField.RELEASE_SHAPE, I64)
        e.call_address(release, ir.FunctionType(VOID, [POINTER]), [info])
        self.require(e.b.icmp_signed("<=", rank, e.const(max_rank)), InputErrorCode.RANK)
        return rank

    def dimensions(self, value: ir.Value, rank: int) -> list[ir.Value]:
        """Emit the dimensions of a tensor, which must have this rank."""
        self.require_equal(InputErrorCode.RANK, (self.rank(value), self._e.const(rank)))
        return [self._e.load(self.shape, axis, I64) for axis in range(rank)]

    def count(self, value: ir.Value) -> ir.Value:
        """Emit the number of elements of a tensor."""
        return self.leading_elements(self.rank(value))

    def leading_elements(self, rank: ir.Value) -> ir.Value:
        """Emit the product of the first `rank` dimensions in `shape`."""
        e = self._e
        with e.loop(e.const(0), rank, carried=[e.const(1)]) as (axis, counts, updated):
            updated.append(e.b.mul(counts[0], e.load(self.shape, axis, I64)))
        return updated[0]

    def output(self, index: int, dimensions: Sequence[ir.Value]) -> ir.Value:
        """Emit the address of the values of an output with these dimensions."""
        for axis, size in enumerate(dimensions):
            self._e.store(size, self.shape, axis)
        return self.output_like_shape(index, self._e.const(len(dimensions)))

    def output_like_shape(self, index: int, rank: ir.Value) -> ir.Value:
        """Emit the address of the values of an output whose dimensions are in `shape`."""
        self._call(StateField.GET_OUTPUT, self._context, self._e.const(index), self.shape, rank, self._out)
        return self.data(self._result())

    def parallel_for(self, function: ir.Value, count: ir.Value, params: ir.Value) -> None:
        """Emit calls of function(params, i) for i in [0, count): by the threads, or directly if count is 1."""
        e, b = self._e, self._e.b
        with b.if_else(b.icmp_signed("==", count, e.const(1))) as (then, otherwise):
            with then:
                ir_type = ir.FunctionType(VOID, [POINTER, I64])
                e.call_address(b.ptrtoint(function, I64), ir_type, [params, e.const(0)])
            with otherwise, b.if_then(b.icmp_signed(">", count, e.const(0))):
                self._call(StateField.PARALLEL_FOR, self._context, function, count, count, params)

    def _call(self, field: StateField, *arguments: ir.Value) -> None:
        """Emit a call of an onnxruntime function, and the return of its status if that is not null."""
        b = self._e.b
        ir_type = ir.FunctionType(POINTER, [value.type for value in arguments])
        status = self._e.call_address(self._e.load(self._state, field, I64), ir_type, arguments)
        with b.if_then(self.is_given(status), likely=False):
            b.ret(status)

    def _result(self) -> ir.Value:
        return self._e.b.load(self._out, typ=POINTER)
