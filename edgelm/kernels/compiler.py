"""Compiles the kernels: LLVM IR to a shared library for one processor.

Runs as a separate process, so that the memory of the compiler is freed: see `edgelm.runtime.prepack`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from llvmlite import binding

from edgelm.kernels.abi import WeightFormat
from edgelm.kernels.elf import link_shared_library
from edgelm.kernels.ir.module import build_module
from edgelm.kernels.ir.targets import TARGETS, Target


def find_host_target() -> Target | None:
    """Return the best target whose instruction sets this processor supports; None if there is none."""
    architecture = binding.get_default_triple().split("-")[0]
    features = binding.get_host_cpu_features()
    for target in TARGETS:
        if target.triple.split("-")[0] == architecture and all(features.get(name) for name in target.features):
            return target
    return None


def compile_kernels(target: Target, formats: Sequence[WeightFormat], cpu: str, features: str = "") -> bytes:
    """Return a shared library (ELF) with attention and the operators of the given formats.

    `cpu` and `features` are LLVM's names of the processor and of its features. Raises `RuntimeError` if LLVM refuses
    them or the code.
    """
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    code, names = build_module(target, formats)
    module = binding.parse_assembly(str(code))
    module.verify()
    machine = binding.Target.from_triple(target.triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="pic", codemodel="small"
    )
    options = binding.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False  # the kernels use vector types already
    options.loop_unrolling = False  # it puts weights on the stack (see `ir.matmul_kernels._block_sums_by_pairs`)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return link_shared_library(machine.emit_object(module), names)


def main(arguments: Sequence[str] | None = None) -> str | None:
    """Compile for this processor with arguments such as FILE 4:32 8:32; return an error message or None."""
    arguments = sys.argv[1:] if arguments is None else arguments
    target = find_host_target()
    if target is None:
        return "this processor has neither AVX2 nor Arm's dot product instructions"
    formats = [WeightFormat(*map(int, text.split(":"))) for text in arguments[1:]]
    features = binding.get_host_cpu_features().flatten()
    try:
        library = compile_kernels(target, formats, binding.get_host_cpu_name(), features)
    except Exception as error:  # noqa: BLE001  the caller reads one line, LLVM's messages have several
        return f"LLVM {binding.llvm_version_info}: {' '.join(str(error).split())[:300]}"
    Path(arguments[0]).write_bytes(library)
    return None
