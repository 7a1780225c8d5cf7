"""Summarizes onnxruntime's profile of a graph's runs by operator and by layer.

Pure functions from events to tables. Knows how `edgelm export` names nodes; knows nothing of runners, files or text.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median
from typing import Any, Final

from edgelm.bundle.manifest import Manifest, Matrix
from edgelm.kernels.abi import QUANT_PARAM_BYTES, WeightFormat

MATMUL_OPERATORS: Final = {"MatMulNBits", "MatMul", "Gemm", "FusedMatMul", "FusedGemm"}
SUFFIX: Final = "_kernel_time"
LAYER: Final = re.compile(r"layer\.(\d+)\.")
EMBEDDING: Final = re.compile(r"(embedded|embedding|hidden)(\W|$)")
LAYER_PART: Final = re.compile(r"layer \d+$")
HEAD: Final = re.compile(r"(logits|head|final)(\W|$)")


@dataclass(frozen=True, slots=True)
class NodeRun:
    """One execution of a node. `us` excludes nodes nested in it (branches, loops)."""

    name: str
    operator: str
    us: float
    shape: tuple[int, int, int] | None = None
    """(M, K, N) of a matrix product [M, K] x [K, N] with a constant matrix."""


@dataclass(frozen=True, slots=True)
class GraphRun:
    """One run of a graph: its time, and its nodes in the order of their start."""

    us: float
    nodes: tuple[NodeRun, ...]


@dataclass(frozen=True, slots=True)
class OperatorTotal:
    """Sums per step over the nodes of one operator; for matrix products, of one shape and bit width."""

    operator: str
    shape: tuple[int, int] | None
    """(K, N) of the matrix."""
    bits: int | None
    nodes: float
    us: float
    bytes: float
    """Bytes of the matrices read, as in memory: codes, scales and zero points."""
    operations: float
    """Multiplications and additions of the matrix products."""

    @property
    def us_each(self) -> float:
        """Microseconds per node."""
        return self.us / self.nodes

    @property
    def gb_s(self) -> float | None:
        """Bytes of matrices read per second, in GB (10^9); None if no bytes or no time were recorded."""
        return self.bytes / self.us / 1e3 if self.bytes and self.us else None

    @property
    def gflop_s(self) -> float | None:
        """Operations per second, in 10^9; None as with `gb_s`."""
        return self.operations / self.us / 1e3 if self.operations and self.us else None


@dataclass(frozen=True, slots=True)
class ModelPart:
    """The share of one part of the model in a step: `embedding`, `layer 0`, `layer 1`, ..., `head`."""

    name: str
    nodes: float
    us: float
    operators: tuple[str, ...]
    """The operators of its nodes in order; `group_layers` groups layers with equal operators."""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """A typical step. The `us` of all operators add up to `nodes_us`; so do those of all parts."""

    nodes_us: float
    between_us: float
    """Median time of the graph's runs outside their nodes."""
    operators: tuple[OperatorTotal, ...]
    """Longest first."""
    parts: tuple[ModelPart, ...] | None
    """In the order of the model; None if the nodes' names do not show every layer."""

    @property
    def run_us(self) -> float:
        """Time of the graph's runs: the nodes, and the time between them."""
        return self.nodes_us + self.between_us

    def share(self, us: float) -> float:
        """Return `us` as a share of the nodes' time, in [0, 1]."""
        return us / self.nodes_us if self.nodes_us else 0.0


def parse_runs(events: Iterable[Mapping[str, Any]]) -> list[GraphRun]:
    """Return the runs of a profile in the order of time.

    `events` are the dictionaries of onnxruntime's profile, in any order, with `cat`, `name`, `ts` and `dur` in us, and
    `args`. Nodes outside every run are omitted.
    """
    spans: list[tuple[float, float]] = []
    nodes: list[tuple[float, float, NodeRun]] = []
    for event in events:
        if event.get("cat") == "Session" and event["name"] == "model_run":
            spans.append((event["ts"], event["dur"]))
        elif event.get("cat") == "Node" and event["name"].endswith(SUFFIX):
            nodes.append((event["ts"], event["dur"], _parse_node(event)))
    spans.sort()
    starts = [start for start, _ in spans]
    found: list[list[NodeRun]] = [[] for _ in spans]
    for start, node in _subtract_nested(nodes):
        run = bisect_right(starts, start) - 1
        if run >= 0 and start <= starts[run] + spans[run][1]:
            found[run].append(node)
    return [GraphRun(us, tuple(inner)) for (_, us), inner in zip(spans, found, strict=True)]


def summarize_steps(steps: Sequence[Sequence[GraphRun]], manifest: Manifest) -> StepProfile:
    """Summarize one or more steps of one or more runs each as a typical step: each node has its median time.

    The median ignores interruptions of single steps. A node that only some steps run counts in proportion.
    `manifest` gives the sizes of matrices, the number of layers, and whether the names of nodes are ours.
    """
    typical = _typical(steps)
    finder = _MatrixFinder(manifest.matrices)
    sums: dict[tuple[str, tuple[int, int] | None, int | None], list[float]] = {}
    for node, frequency in typical:
        shape, bits, size = finder.find(node)
        entry = sums.setdefault((node.operator, shape, bits), [0.0, 0.0, 0.0, 0.0])
        operations = 2.0 * math.prod(node.shape) if node.shape and shape else 0.0
        for at, value in enumerate((1.0, node.us, size, operations)):
            entry[at] += frequency * value
    operators = [OperatorTotal(*key, *entry) for key, entry in sums.items()]
    operators.sort(key=lambda each: (-each.us, each.operator, each.shape or ()))
    between_us = median(sum(run.us - sum(node.us for node in run.nodes) for run in step) for step in steps)
    nodes_us = math.fsum(frequency * node.us for node, frequency in typical)
    parts = _parts(typical, manifest.cache.layers) if manifest.via == "native" else None
    return StepProfile(nodes_us, between_us, tuple(operators), parts)


def group_layers(parts: Sequence[ModelPart]) -> list[list[ModelPart]]:
    """Return the parts in order, with consecutive layers of equal operators in one group."""
    groups = groupby(parts, lambda part: part.operators if LAYER_PART.match(part.name) else part.name)
    return [list(group) for _, group in groups]


def find_part(name: str, layers: int) -> str | None:
    """Return the part of the model from a node's name: `embedding`, `layer 3`, `head`, or None."""
    found = LAYER.match(name)
    if found is not None:  # older exporters named the final norm like another layer
        return f"layer {int(found[1])}" if int(found[1]) < layers else "head"
    return "embedding" if EMBEDDING.match(name) else "head" if HEAD.match(name) else None


def _typical(steps: Sequence[Sequence[GraphRun]]) -> list[tuple[NodeRun, float]]:
    """Return each node with its median time and the share of the steps that ran it."""
    times: dict[tuple[int, str, int], tuple[NodeRun, list[float]]] = {}
    for step in steps:
        for number, run in enumerate(step):
            seen: Counter[str] = Counter()
            for node in run.nodes:
                seen[node.name] += 1
                _, us = times.setdefault((number, node.name, seen[node.name]), (node, []))
                us.append(node.us)
    return [(replace(node, us=median(us)), len(us) / len(steps)) for node, us in times.values()]


def _parts(typical: Sequence[tuple[NodeRun, float]], layers: int) -> tuple[ModelPart, ...] | None:
    """Sum by part; a node whose name shows no part belongs to the part of the node before it."""
    names = ["embedding", *(f"layer {i}" for i in range(layers)), "head"]
    nodes, us = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    operators: dict[str, list[str]] = {name: [] for name in names}
    seen, part = set(), names[0]
    for node, frequency in typical:
        own = find_part(node.name, layers)
        if own is not None:
            part = own
            seen.add(own)
        nodes[part] += frequency
        us[part] += frequency * node.us
        operators[part].append(node.operator)
    if not seen >= set(names[1:-1]):
        return None
    return tuple(ModelPart(name, nodes[name], us[name], tuple(operators[name])) for name in names)


class _MatrixFinder:
    """Finds the matrix that a node reads: by the node's name, or by the shape of its product."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self._by_name = {matrix.name: matrix for matrix in matrices}
        if "embedding" in self._by_name:
            self._by_name.setdefault("head", self._by_name["embedding"])
        self._by_shape: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in matrices:
            self._by_shape.setdefault((matrix.columns, matrix.rows), []).append(matrix)

    def find(self, node: NodeRun) -> tuple[tuple[int, int] | None, int | None, float]:
        """Return (K, N), bits per weight and bytes in memory of the matrix; (None, None, 0) if the node reads none.

        If several matrices have the shape, the bytes are their mean, and the bits are None unless all are equal.
        """
        if node.shape is None:
            return None, None, 0.0
        shape = node.shape[1:]
        if shape not in self._by_shape:
            return None, None, 0.0
        name = "head" if node.name == "logits" else node.name.removesuffix(".out").removesuffix(".out.product")
        named = self._by_name.get(name)
        if named is not None and (named.columns, named.rows) == shape:
            return shape, named.bits, _bytes(named, node)
        candidates = self._by_shape[shape]
        bits = {matrix.bits for matrix in candidates}
        mean = math.fsum(_bytes(matrix, node) for matrix in candidates) / len(candidates)
        return shape, bits.pop() if len(bits) == 1 else None, mean


def _bytes(matrix: Matrix, node: NodeRun) -> int:
    """Return the bytes in memory; scales are float16 for our kernels and float32 for onnxruntime's."""
    return replace(matrix, scale_bits=16 if WeightFormat.from_op_type(node.operator) else 32).bytes()


def _parse_node(event: Mapping[str, Any]) -> NodeRun:
    args = event["args"]
    operator = args["op_name"]
    fmt = WeightFormat.from_op_type(operator)
    shape = None
    if fmt is not None:
        shape = _own_product_shape(args, fmt)
    elif operator in MATMUL_OPERATORS:
        shape = _product_shape(args)
    return NodeRun(event["name"].removesuffix(SUFFIX), operator, event["dur"], shape)


def _product_shape(args: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return (M, K, N) if the second factor is a matrix, or not listed because a kernel repacked it; else None."""
    inputs, outputs = ([_dims(each) for each in args.get(f"{side}_type_shape", ())] for side in ("input", "output"))
    if not inputs or not outputs or not inputs[0] or not outputs[0] or any(len(dims) > 2 for dims in inputs[1:2]):
        return None
    *rows, columns = inputs[0]
    return math.prod(rows), columns, outputs[0][-1]


def _own_product_shape(args: Mapping[str, Any], fmt: WeightFormat) -> tuple[int, int, int]:
    """Return (M, K, N) of a product by our kernels.

    The second output is scratch memory, whose size gives the number of blocks. The input of a fused SwiGLU has gates
    and values, twice the width of the matrix, whose last block may be partial.
    """
    *rows, width = _dims(args["input_type_shape"][0])
    y, scratch = (_dims(each) for each in args["output_type_shape"][:2])
    count = math.prod(rows)
    whole = scratch[0] // (count * (fmt.block_size * fmt.code_bytes + QUANT_PARAM_BYTES)) * fmt.block_size
    return count, width // 2 if width > whole else width, y[-1]


def _dims(typed: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """Return the dimensions of one entry of a list of shapes: {"float": [1, 64]} -> [1, 64]."""
    return next(iter(typed.values()), ())


def _subtract_nested(nodes: list[tuple[float, float, NodeRun]]) -> Iterator[tuple[float, NodeRun]]:
    """Yield (start, node) in order of start, each node's time without the nodes nested in it."""
    nodes.sort(key=lambda each: (each[0], -each[1]))
    own = [us for _, us, _ in nodes]
    open_: list[int] = []
    for at, (start, us, _) in enumerate(nodes):
        while open_ and start >= nodes[open_[-1]][0] + nodes[open_[-1]][1]:
            open_.pop()
        if open_:
            own[open_[-1]] -= us
        open_.append(at)
    for (start, _, node), us in zip(nodes, own, strict=True):
        yield start, node if us == node.us else replace(node, us=max(us, 0.0))
