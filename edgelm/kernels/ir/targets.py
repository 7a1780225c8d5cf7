"""Kinds of processors: how each multiplies bytes, and how many rows fit into its registers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from llvmlite import ir

from edgelm.kernels.abi import MAX_INT8_CODE, PANEL_COLUMNS
from edgelm.kernels.ir.emitter import I8, I16, I32


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of processor.

    `lanes` is the number of 32-bit lanes of a vector register. `row_tiles` and `query_tiles` are the numbers of
    activation rows and of queries that one kernel computes at once, largest first, `max_accumulators` the number of
    accumulators of 16 values that fit into the registers. With `has_signed_dot` the dot product instruction multiplies
    int8 by int8, and there is none for int16: 8-bit weights are shifted by 128 first, and 16-bit codes are multiplied
    as two bytes.
    """

    name: str
    triple: str
    features: tuple[str, ...]
    lanes: int
    row_tiles: tuple[int, ...]
    query_tiles: tuple[int, ...]
    max_accumulators: int
    has_signed_dot: bool = False

    def zero_point(self, bits: int) -> int:
        """Return the code of a weight of 0 in the dot product: half of the range, but 0 for shifted 8-bit weights."""
        return 0 if self.has_signed_dot and bits == 8 else 1 << (bits - 1)

    def row_tiles_for(self, bits: int) -> tuple[int, ...]:
        """Return the numbers of rows that one kernel computes: at most half as many if each row needs two sums."""
        return self.row_tiles[1:] if self.has_signed_dot and bits == 8 else self.row_tiles

    def wide_codes(self, b: ir.IRBuilder, codes: ir.Value) -> ir.Value:
        """Return 16 codes, <16 x i32>, in the layout of the dot product: two words of 32 bits for every four codes.

        Without `has_signed_dot`: int16, codes 0 and 2 in one word, 1 and 3 in the other, as the weights of a column are
        split. With it: int8, the four low bytes in one word, the four high bytes in the other; a code is 256 * high +
        low.
        """
        if not self.has_signed_dot:
            order = ir.Constant(ir.VectorType(I32, 16), [4 * four + i for four in range(4) for i in (0, 2, 1, 3)])
            words = b.trunc(codes, ir.VectorType(I16, 16))
            return b.shuffle_vector(words, ir.Constant(words.type, ir.Undefined), order)
        low = b.trunc(codes, ir.VectorType(I8, 16))
        high = b.ashr(b.sub(codes, b.sext(low, codes.type)), ir.Constant(codes.type, [8] * 16))
        lanes = [byte + 4 * four + i for four in range(4) for byte in (0, 16) for i in range(4)]
        order = ir.Constant(ir.VectorType(I32, 32), lanes)
        return b.shuffle_vector(low, b.trunc(high, low.type), order)

    def dot(self, b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, activations: ir.Value, bits: int) -> ir.Value:
        """Add the products of four weights and four activations, <64 x i8> each, to each of the sums, <16 x i32>."""
        if self.has_signed_dot and bits == 8:
            weights = b.xor(weights, ir.Constant(weights.type, [0x80] * 64))
        return self._by_registers(b, 4, _DOTS[self.name], sums, weights, activations)

    def max_int16_sums(self, bits: int) -> int:
        """Return how many results of `multiply_pairs` can be added up in int16; 0 if an instruction sums in int32.

        The sum of two products of unsigned weights and activations is at most 2 * (2 ** bits - 1) * 127.
        """
        return 0 if self.name != "avx2" else (1 << 15) // (2 * ((1 << bits) - 1) * MAX_INT8_CODE)

    def multiply_pairs(
        self, b: ir.IRBuilder, pairs: ir.Value | None, weights: ir.Value, activations: ir.Value
    ) -> ir.Value:
        """Return sums of two products each, <32 x i16>, of weights and activations, <64 x i8>, added to `pairs`."""
        parts = []
        for i in range(PANEL_COLUMNS // self.lanes):
            products = _maddubs(b, *(_slice(b, value, i, 4 * self.lanes) for value in (weights, activations)))
            parts.append(products if pairs is None else b.add(products, _slice(b, pairs, i, 2 * self.lanes)))
        return _concatenate(b, *parts)

    def widen_pairs(self, b: ir.IRBuilder, sums: ir.Value, pairs: ir.Value) -> ir.Value:
        """Add the two sums in `pairs`, <32 x i16>, that belong to each of the sums, <16 x i32>."""
        return self._by_registers(b, 2, _avx2_pairs, sums, pairs)

    def dot_int16(self, b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, even: ir.Value, odd: ir.Value) -> ir.Value:
        """Add the products of four weights, <64 x i8>, and four 16-bit activations to each of the sums, <16 x i32>.

        even: activations 0 and 2 for each sum; odd: activations 1 and 3; int16, as <64 x i8> each.
        """
        return self._by_registers(b, 4, _WORD_DOTS[self.name], sums, weights, even, odd)

    def _by_registers(
        self, b: ir.IRBuilder, each: int, dot: Callable[..., ir.Value], sums: ir.Value, *values: ir.Value
    ) -> ir.Value:
        """Apply `dot` to slices of `lanes` sums, with `each` elements of the values for each sum; return all sums."""
        parts = []
        for i in range(PANEL_COLUMNS // self.lanes):
            slices = [_slice(b, value, i, each * self.lanes) for value in values]
            parts.append(dot(b, _slice(b, sums, i, self.lanes), *slices))
        while len(parts) > 1:
            parts = [_concatenate(b, one, other) for one, other in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]


def _slice(b: ir.IRBuilder, value: ir.Value, index: int, size: int) -> ir.Value:
    """Return slice `index` of a vector that is divided into slices of `size` elements."""
    if value.type.count == size:
        return value
    picked = ir.Constant(ir.VectorType(I32, size), list(range(index * size, (index + 1) * size)))
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), picked)


def _concatenate(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    size = 2 * one.type.count
    return b.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, size), list(range(size))))


def _call(b: ir.IRBuilder, name: str, *arguments: ir.Value) -> ir.Value:
    """Call an intrinsic of the processor whose result has the type of its first argument."""
    module = b.module
    function = module.globals.get(name)
    if function is None:
        ir_type = ir.FunctionType(arguments[0].type, [value.type for value in arguments])
        function = ir.Function(module, ir_type, name)
    return b.call(function, arguments)


def _vnni(b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
    words = [b.bitcast(value, sums.type) for value in (weights, activations)]
    return _call(b, "llvm.x86.avx512.vpdpbusd.512", sums, *words)


def _vnni_words(b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, even: ir.Value, odd: ir.Value) -> ir.Value:
    for pairs, activations in zip(_pairs(b, weights), (even, odd), strict=True):
        words = [b.bitcast(value, sums.type) for value in (pairs, activations)]
        sums = _call(b, "llvm.x86.avx512.vpdpwssd.512", sums, *words)
    return sums


def _maddubs(b: ir.IRBuilder, weights: ir.Value, activations: ir.Value) -> ir.Value:
    """Return sums of two products of bytes in int16. They do not overflow for weights of up to 6 bits."""
    words = ir.VectorType(I16, weights.type.count // 2)
    name = "llvm.x86.avx2.pmadd.ub.sw"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(words, [weights.type] * 2), name)
    return b.call(function, [weights, activations])


def _avx2_pairs(b: ir.IRBuilder, sums: ir.Value, pairs: ir.Value) -> ir.Value:
    return b.add(sums, _pmaddwd(b, sums.type, pairs, ir.Constant(pairs.type, [1] * pairs.type.count)))


def _avx2_words(b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, even: ir.Value, odd: ir.Value) -> ir.Value:
    products = [
        _pmaddwd(b, sums.type, pairs, b.bitcast(activations, pairs.type))
        for pairs, activations in zip(_pairs(b, weights), (even, odd), strict=True)
    ]
    return b.add(sums, b.add(*products))


def _pairs(b: ir.IRBuilder, weights: ir.Value) -> list[ir.Value]:
    """Return weights 0 and 2, and weights 1 and 3, of every four, as int16."""
    words = ir.VectorType(I16, weights.type.count // 2)
    w = b.bitcast(weights, words)
    low = b.and_(w, ir.Constant(words, [255] * words.count))
    return [low, b.lshr(w, ir.Constant(words, [8] * words.count))]


def _pmaddwd(b: ir.IRBuilder, result: ir.Type, one: ir.Value, other: ir.Value) -> ir.Value:
    name = "llvm.x86.avx2.pmadd.wd"
    function = b.module.globals.get(name) or ir.Function(b.module, ir.FunctionType(result, [one.type] * 2), name)
    return b.call(function, [one, other])


def _dotprod(b: ir.IRBuilder, sums: ir.Value, weights: ir.Value, activations: ir.Value) -> ir.Value:
    return _call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", sums, weights, activations)


_DOTS: Final = {"avx512-vnni": _vnni, "dotprod": _dotprod}
_WORD_DOTS: Final = {"avx512-vnni": _vnni_words, "avx2": _avx2_words}

TARGETS: Final = (
    Target(
        "avx512-vnni",
        "x86_64-unknown-linux-gnu",
        ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "f16c"),
        16,
        (8, 4, 2, 1),
        (4, 3, 2, 1),
        16,
    ),
    Target("avx2", "x86_64-unknown-linux-gnu", ("avx2", "fma", "f16c"), 8, (4, 2, 1), (2, 1), 4),
    Target("dotprod", "aarch64-unknown-linux-gnu", ("dotprod", "fullfp16"), 4, (4, 2, 1), (1,), 4, has_signed_dot=True),
)
"""All kinds of processors, best first. Features have LLVM's names."""
