"""Our kernels beside MatMulNBits, matrix by matrix: `python -m tests.bench.products`; by hand.

Graphs of nothing but products with matrices that no cache holds together, each measured by a process of its own, in
turns: microseconds a product and what that makes a second, medians over the rounds, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgelm.kernels.abi import WeightFormat
from edgelm.kernels.custom_ops import CustomOpLibrary
from edgelm.kernels.rewrite.graph_rewriter import DATA, GRAPH, rewrite_graph
from edgelm.system.digest import file_sha256
from edgelm.system.isolated_python import build_python_command

SHAPES = ((896, 9728), (4864, 896), (576, 3072), (576, 576))
"""K x N of the 0.5B and of the 135M shape."""
TOGETHER = 120_000_000
"""Weights of a graph: several times what the last cache holds."""


def model_of(form: WeightFormat, size: int, columns: int) -> bytes:
    """Return a graph of MatMulNBits with random matrices."""
    rng, blocks = np.random.default_rng(0), -(-size // form.block_size)
    nodes, tensors, outputs = [], [], []
    for i in range(-(-TOGETHER // (size * columns))):
        codes = rng.integers(0, 256, (columns, blocks, form.block_bytes), np.uint8)
        scales = (rng.random((columns, blocks)) * 0.01).astype(np.float16)
        tensors += [numpy_helper.from_array(codes, f"codes{i}"), numpy_helper.from_array(scales, f"half{i}")]
        nodes.append(helper.make_node("Cast", [f"half{i}"], [f"scales{i}"], to=TensorProto.FLOAT))
        kind = {"K": size, "N": columns, "bits": form.bits, "block_size": form.block_size, "accuracy_level": 4}
        inputs = ["x", f"codes{i}", f"scales{i}"]
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], domain="com.microsoft", **kind))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [None, columns]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, size])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "products", [x], outputs, tensors)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def measure(side: str, form: WeightFormat, size: int, columns: int, rows: int, threads: int) -> float:
    """Return the microseconds of one product."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model: bytes | str = model_of(form, size, columns)
        if side == "ours":
            formats = rewrite_graph(model, folder / "none", folder)
            library = folder / "kernels.so"
            command = build_python_command(
                "edgelm.kernels.compiler", "main", str(library), f"{form.bits}:{form.block_size}"
            )
            subprocess.run(command, check=True)
            CustomOpLibrary(library, formats, folder / DATA, file_sha256(library)).register(options)
            model = str(folder / GRAPH)
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        x = np.random.default_rng(1).normal(size=(rows, size)).astype(np.float32)
        binding.bind_cpu_input("x", x)
        outputs = session.get_outputs()
        for output in outputs:
            room = ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, columns), np.float32))
            binding.bind_ortvalue_output(output.name, room)
        took = []
        for _ in range(8 if rows < 64 else 3):
            begun = time.perf_counter()
            session.run_with_iobinding(binding)
            took.append((time.perf_counter() - begun) / len(outputs) * 1e6)
        return statistics.median(took[1:])


def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    form = WeightFormat(args.bits, args.block)
    if args.one:
        side, *numbers = args.one.split(",")
        print(measure(side, form, *map(int, numbers), args.threads))
        return
    common = ["--threads", str(args.threads), "--block", str(args.block), "--bits", str(args.bits)]
    print("| K x N | rows | ours, us | MatMulNBits, us | ours, 10^9 products/s | times as fast (least-most) |")
    print("|---|---:|---:|---:|---:|---:|")
    for size, columns in SHAPES:
        for rows in (1, 8, 256):
            found: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(args.rounds):
                for side, values in found.items():
                    one = f"{side},{size},{columns},{rows}"
                    command = [sys.executable, "-m", "tests.bench.products", *common, "--one", one]
                    values.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            ratios = [theirs / ours for ours, theirs in zip(*found.values(), strict=True)]
            ours, theirs = map(statistics.median, found.values())
            rate = size * columns * rows / ours / 1e3
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"| {size} x {columns} | {rows} | {ours:.0f} | {theirs:.0f} | {rate:.0f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
