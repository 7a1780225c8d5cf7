"""Processors that the kernels are written for: how each multiplies bytes, how many rows fit its registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from llvmlite import ir

from edgelm.native.emitter import I16, I32
from edgelm.native.formats import COLUMNS


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of processor.

    `rows` are how many rows of activations a kernel takes at once, `attention_rows` how many queries, `across` how many
    vectors of 16 columns of values with these.
    `signed_bytes` says that its instruction multiplies signed bytes by signed bytes, so that weights of 8 bits are
    moved by 128 first.
    """

    name: str
    triple: str
    features: tuple[str, ...]
    lanes: int
    rows: tuple[int, ...]
    attention_rows: tuple[int, ...]
    across: int
    signed_bytes: bool = False

    def zero_point(self, bits: int) -> int:
        """Return what stands for a weight of 0 in the dot product: a half of the range, but for moved ones."""
        return 0 if self.signed_bytes and bits == 8 else 1 << (bits - 1)

    def dot(self, b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, activations: ir.Value, bits: int) -> ir.Value:
        """Add to each of the sums, <16 x i32>, the products of four weights and four activations, <64 x i8> each."""
        if self.signed_bytes and bits == 8:
            weights = b.xor(weights, ir.Constant(weights.type, [0x80] * 64))
        parts = []
        for i in range(COLUMNS // self.lanes):
            some_weights, some_activations = (_part(b, value, i, 4 * self.lanes) for value in (weights, activations))
            parts.append(_DOTS[self.name](b, _part(b, sums, i, self.lanes), some_weights, some_activations, bits))
        while len(parts) > 1:
            parts = [_joined(b, one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]


def _part(b: ir.IRBuilder, value: ir.Value, index: int, size: int) -> ir.Value:
    """Return a slice of a vector."""
    if value.type.count == size:
        return value
    picked = ir.Constant(ir.VectorType(I32, size), list(range(index * size, (index + 1) * size)))
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), picked)


def _joined(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    size = 2 * one.type.count
    return b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, size), list(range(size))))


def _call(b: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """Call an instruction of the processor, whose result is like its first argument."""
    module = b.module
    function = module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(arguments[0].type, [value.type for value in arguments])
        function = ir.Function(module, kind, name)
    return b.call(function, arguments)


def _vnni(b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, activations: ir.Value, _: int) -> ir.Value:
    words = [b.bitcast(value, sums.type) for value in (weights, activations)]
    return _call(b, "llvm.x86.avx512.vpdpbusd.512", sums, *words)


def _avx2(b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, activations: ir.Value, bits: int) -> ir.Value:
    """Products of bytes in 16 bits, which overflow with weights of 8 bits; those are widened first."""
    words = ir.VectorType(I16, 2 * sums.type.count)
    if bits < 8:
        function = b.module.globals.get("llvm.x86.avx2.pmadd.ub.sw") or ir.Function(
            b.module, ir.FunctionType(words, [weights.type] * 2), "llvm.x86.avx2.pmadd.ub.sw"
        )
        pairs = b.call(function, [weights, activations])
        return b.add(sums, _pmaddwd(b, sums.type, pairs, ir.Constant(words, [1] * words.count)))
    eight = ir.Constant(words, [8] * words.count)
    w, a = (b.bitcast(value, words) for value in (weights, activations))
    even = _pmaddwd(b, sums.type, b.and_(w, ir.Constant(words, [255] * words.count)), b.ashr(b.shl(a, eight), eight))
    return b.add(sums, b.add(even, _pmaddwd(b, sums.type, b.lshr(w, eight), b.ashr(a, eight))))


def _pmaddwd(b: ir.IRBuilder, result: ir.Type, one: ir.Value, other: ir.Value) -> ir.Value:
    name = "llvm.x86.avx2.pmadd.wd"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, [one.type] * 2), name)
    return b.call(function, [one, other])


def _dotprod(b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, activations: ir.Value, _: int) -> ir.Value:
    return _call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, weights, activations)


_DOTS: Final = {"avx512-vnni": _vnni, "avx2": _avx2, "dotprod": _dotprod}

TARGETS: Final = (
    Target(
        "avx512-vnni",
        "x86_64-unknown-linux-gnu",
        ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c"),
        16,
        (8, 4, 2, 1),
        (4, 3, 2, 1),
        4,
    ),
    Target("avx2", "x86_64-unknown-linux-gnu", ("avx2", "fma", "f16c"), 8, (4, 2, 1), (2, 1), 2),
    Target("dotprod", "aarch64-unknown-linux-gnu", ("dotprod", "fullfp16"), 4, (4, 2, 1), (1,), 4, signed_bytes=True),
)
"""Kinds of processors, the best first, by the names that LLVM gives to instruction sets."""
