"""The LLVM module of a library: all operators, and the functions with which onnxruntime registers them."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from edgelm.kernels.abi import DESTROY, REGISTER, SET_CALLBACK_SYMBOL, WeightFormat
from edgelm.kernels.ir.attention_operator import emit_attention
from edgelm.kernels.ir.emitter import I64, POINTER, VOID, Emitter
from edgelm.kernels.ir.gather_operator import emit_gather
from edgelm.kernels.ir.matmul_operator import emit_matmul_operator
from edgelm.kernels.ir.targets import Target


def build_module(target: Target, formats: Sequence[WeightFormat]) -> tuple[ir.Module, list[str]]:
    """Return the module with attention and the operators of some formats, and the symbols to export."""
    module = ir.Module("edgelm")
    module.triple = target.triple
    _emit_registration(module)
    for fmt in formats:
        emit_matmul_operator(module, target, fmt)
        emit_gather(module, fmt)
    names = [name for fmt in formats for name in (fmt.matmul_symbol, fmt.gather_symbol)]
    return module, [SET_CALLBACK_SYMBOL, REGISTER, DESTROY, emit_attention(module, target), *names]


def _emit_registration(module: ir.Module) -> None:
    """Emit `RegisterCustomOps`, which calls the stored callback, the function that stores it, and an empty destroy."""
    callback = ir.GlobalVariable(module, POINTER, "hook")
    callback.linkage = "internal"
    callback.initializer = ir.Constant(POINTER, None)
    setter = Emitter(module, SET_CALLBACK_SYMBOL, VOID, [POINTER], export=True)
    setter.b.store(setter.function.args[0], callback)
    setter.b.ret_void()
    register = Emitter(module, REGISTER, POINTER, [POINTER, POINTER], export=True)
    kind = ir.FunctionType(POINTER, [POINTER, POINTER])
    function = register.b.ptrtoint(register.b.load(callback, typ=POINTER), I64)
    register.b.ret(register.call_address(function, kind, register.function.args))
    destroy = Emitter(module, DESTROY, VOID, [POINTER], export=True)
    destroy.b.ret_void()
