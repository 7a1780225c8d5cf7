"""Kernels for other processors: instructions that this processor lacks are replaced by their definitions."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from kernel_nodes import inputs, matrix, product, run
from llvmlite import binding

from edgelm.kernels import compiler as compiler
from edgelm.kernels.abi import WeightFormat
from edgelm.kernels.ir.module import build_module
from edgelm.kernels.ir.targets import TARGETS

FORMATS = [
    WeightFormat(4, 16),
    WeightFormat(4, 32),
    WeightFormat(5, 32),
    WeightFormat(6, 64),
    WeightFormat(8, 16),
    WeightFormat(8, 128),
]

DOT = """define internal <{sums} x i{wide}> @"{name}"({added}<{words}> %v, <{words}> %w) {{
  %a = bitcast <{words}> %v to <{all} x i{bits}>
  %b = bitcast <{words}> %w to <{all} x i{bits}>
  %c = {first} <{all} x i{bits}> %a to <{all} x i{wide}>
  %d = sext <{all} x i{bits}> %b to <{all} x i{wide}>
  %p = mul <{all} x i{wide}> %c, %d
  {sum}
  ret <{sums} x i{wide}> %t{each}
}}"""
"""Sums products of neighbouring elements, of which the first factor is signed or not, and adds them to `%s`, if any."""

INSTRUCTIONS = {
    "llvm.x86.avx512.vpdpbusd.512": {"sums": 16, "words": "16 x i32", "bits": 8, "each": 4, "first": "zext"},
    "llvm.x86.avx512.vpdpwssd.512": {"sums": 16, "words": "16 x i32", "bits": 16, "each": 2, "first": "sext"},
    "llvm.aarch64.neon.sdot.v4i32.v16i8": {"sums": 4, "words": "16 x i8", "bits": 8, "each": 4, "first": "sext"},
    "llvm.x86.avx2.pmadd.ub.sw": {
        "sums": 16, "words": "32 x i8", "bits": 8, "each": 2, "first": "zext", "wide": 16, "adds": False,
    },
    "llvm.x86.avx2.pmadd.wd": {
        "sums": 8, "words": "16 x i16", "bits": 16, "each": 2, "first": "sext", "adds": False,
    },
}  # fmt: skip


def definition(name, *, sums, words, bits, each, first, wide=32, adds=True):
    """Return an instruction as LLVM IR for any processor. It does not saturate: no sum in these tests overflows."""
    begin = "%s" if adds else "zeroinitializer"
    every, lines = sums * each, [f"%t0 = add <{sums} x i{wide}> {begin}, zeroinitializer"]
    for i in range(each):
        mask = ", ".join(f"i32 {lane * each + i}" for lane in range(sums))
        lines.append(
            f"%q{i} = shufflevector <{every} x i{wide}> %p, <{every} x i{wide}> undef, <{sums} x i32> <{mask}>\n"
            f"  %t{i + 1} = add <{sums} x i{wide}> %t{i}, %q{i}"
        )
    added = f"<{sums} x i{wide}> %s, " if adds else ""
    return DOT.format(
        name=name, sums=sums, words=words, all=every, bits=bits, each=each, first=first, wide=wide, added=added,
        sum="\n  ".join(lines),
    )  # fmt: skip


def without_instructions(code):
    """Return a module's text with definitions in place of the declared instructions of other processors."""
    for name, kind in INSTRUCTIONS.items():
        ours = name.replace("llvm.", "defined.")
        code = re.sub(rf'declare [^\n]*@"{re.escape(name)}"[^\n]*', lambda _: definition(ours, **kind), code)  # noqa: B023
        code = code.replace(f'@"{name}"', f'@"{ours}"')
    return code


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The kernels of this processor."""
    target = compiler.find_host_target()
    if target is None:
        pytest.skip("there are no kernels for this processor")
    file = tmp_path_factory.mktemp("kernels") / "kernels.so"
    file.write_bytes(compiler.compile_kernels(target, FORMATS, "", features_of(target)))
    return file


def features_of(target):
    return ",".join(f"+{name}" for name in target.features)


def has(target):
    """Whether this processor has a target's instructions."""
    features = binding.get_host_cpu_features()
    is_of_kind = target.triple.split("-")[0] == binding.get_process_triple().split("-")[0]
    return is_of_kind and all(features.get(name) for name in target.features)


@pytest.mark.parametrize("is_real", [True, False], ids=["instructions", "definitions"])
@pytest.mark.parametrize("name", [target.name for target in TARGETS])
def test_every_target_computes_the_same_bits(here, name, is_real, tmp_path, monkeypatch):
    target = next(target for target in TARGETS if target.name == name)
    if is_real and not has(target):
        pytest.skip("this processor lacks the instructions; their definitions are tested")

    def defined(target, formats):
        module, names = build_module(target, formats)
        code = without_instructions(str(module))
        assert code.count("define internal <") > 0
        return code, names

    if not is_real:
        monkeypatch.setattr(compiler, "build_module", defined)
    library = tmp_path / "kernels.so"
    as_here = replace(target, triple=binding.get_process_triple())
    features = features_of(target if is_real else compiler.find_host_target())
    library.write_bytes(compiler.compile_kernels(as_here, FORMATS, "", features))
    rng = np.random.default_rng(0)
    for fmt in FORMATS:
        for size, columns, rows in ((150, 40, 15), (33, 5, 2)):
            codes, scales, bias = matrix(rng, fmt, size, columns)
            norm = rng.normal(size=size).astype(np.float32)
            for options in ({"bias": bias}, {"norm": norm, "epsilon": 1e-5}, {"gated": True}):
                x = inputs(rng, rows, 2 * size if "gated" in options else size)
                found, expected = (
                    run(product(each, fmt, size, codes, scales, **options), x) for each in (library, here)
                )
                np.testing.assert_array_equal(found, expected)
        largest = np.full_like(matrix(rng, fmt, 256, 20)[0], 255), np.ones((20, 256 // fmt.block_size), np.float16)
        for x in (np.ones((3, 256), np.float32), -np.ones((3, 256), np.float32)):
            found = run(product(library, fmt, 256, *largest), x)
            np.testing.assert_allclose(found, np.full_like(found, x[0, 0] * 256 * ((1 << (fmt.bits - 1)) - 1)))
