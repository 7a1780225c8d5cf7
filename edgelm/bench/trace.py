"""onnxruntime's profile of a graph's runs, folded by operator and by layer.

Pure: events in, tables out. Knows how `edgelm export` names nodes; knows nothing of sessions, files or text.
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
    """One execution of a node. `us` leaves out what nodes inside it took (branches, loops)."""

    name: str
    operator: str
    us: float
    shape: tuple[int, int, int] | None = None
    """(M, K, N) of a product [M, K] x [K, N] with a constant matrix."""


@dataclass(frozen=True, slots=True)
class GraphRun:
    """One run of a graph: its time, and its nodes in the order in which they began."""

    us: float
    nodes: tuple[NodeRun, ...]


@dataclass(frozen=True, slots=True)
class OperatorTotal:
    """Nodes of one operator, products with matrices of one shape and width by themselves; all figures a step."""

    operator: str
    shape: tuple[int, int] | None
    """(K, N) of the matrix."""
    bits: int | None
    nodes: float
    us: float
    bytes: float
    """Bytes of the matrices that were read: codes, zero points, and scales in float32, as they are in memory."""
    operations: float
    """Multiplications and additions of the products."""

    @property
    def us_each(self) -> float:
        """Microseconds a node."""
        return self.us / self.nodes

    @property
    def gb_s(self) -> float | None:
        """Bytes of matrices a second, in GB (10^9); None where nothing was read or no time was seen."""
        return self.bytes / self.us / 1e3 if self.bytes and self.us else None

    @property
    def gflop_s(self) -> float | None:
        """Operations of products a second, in 10^9; None as with `gb_s`."""
        return self.operations / self.us / 1e3 if self.operations and self.us else None


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What of a step one part of the model takes: `embedding`, `layer 0`, `layer 1`, ..., `head`."""

    name: str
    nodes: float
    us: float
    operators: tuple[str, ...]
    """The operators of its nodes, in order: layers with the same ones are alike."""


@dataclass(frozen=True, slots=True)
class StepProfile:
    """A typical step. The `us` of the operators add up to `nodes_us`, and those of the parts."""

    nodes_us: float
    between_us: float
    """Median of what the graph's runs took beside their nodes."""
    operators: tuple[OperatorTotal, ...]
    """Longest first."""
    parts: tuple[ModelPart, ...] | None
    """In the order of the model; None where the nodes' names do not tell every layer."""

    @property
    def run_us(self) -> float:
        """The graph's runs: the nodes, and what lies between them."""
        return self.nodes_us + self.between_us

    def share(self, us: float) -> float:
        """Return a part of the nodes' time, in [0, 1]."""
        return us / self.nodes_us if self.nodes_us else 0.0


def parse_runs(events: Iterable[Mapping[str, Any]]) -> list[GraphRun]:
    """Return the runs that a profile tells of, in their order; events may come in any order.

    events: what onnxruntime's profile holds, dictionaries with `cat`, `name`, `ts` and `dur` in us, `args`. Nodes
    outside every run are left out.
    """
    spans: list[tuple[float, float]] = []
    nodes: list[tuple[float, float, NodeRun]] = []
    for event in events:
        if event.get("cat") == "Session" and event["name"] == "model_run":
            spans.append((event["ts"], event["dur"]))
        elif event.get("cat") == "Node" and event["name"].endswith(SUFFIX):
            nodes.append((event["ts"], event["dur"], _node(event)))
    spans.sort()
    starts = [start for start, _ in spans]
    found: list[list[NodeRun]] = [[] for _ in spans]
    for start, node in _subtract_nested(nodes):
        run = bisect_right(starts, start) - 1
        if run >= 0 and start <= starts[run] + spans[run][1]:
            found[run].append(node)
    return [GraphRun(us, tuple(inner)) for (_, us), inner in zip(spans, found, strict=True)]


def summarize_steps(steps: Sequence[Sequence[GraphRun]], manifest: Manifest) -> StepProfile:
    """Fold at least one step of at least one run each into a typical one: every node takes its median over the steps.

    A node that one step was interrupted in does not look slow so. One that not every step runs counts for as much less.
    `manifest` tells the sizes of matrices, how many layers there are, and whether the names of nodes are ours.
    """
    typical = _typical(steps)
    weights = _Weights(manifest.matrices)
    sums: dict[tuple[str, tuple[int, int] | None, int | None], list[float]] = {}
    for node, often in typical:
        shape, bits, size = weights.read_by(node)
        entry = sums.setdefault((node.operator, shape, bits), [0.0, 0.0, 0.0, 0.0])
        operations = 2.0 * math.prod(node.shape) if node.shape and shape else 0.0
        for at, value in enumerate((1.0, node.us, size, operations)):
            entry[at] += often * value
    operators = [OperatorTotal(*key, *entry) for key, entry in sums.items()]
    operators.sort(key=lambda each: (-each.us, each.operator, each.shape or ()))
    between_us = median(sum(run.us - sum(node.us for node in run.nodes) for run in step) for step in steps)
    nodes_us = math.fsum(often * node.us for node, often in typical)
    parts = _parts(typical, manifest.cache.layers) if manifest.via == "native" else None
    return StepProfile(nodes_us, between_us, tuple(operators), parts)


def group_layers(parts: Sequence[ModelPart]) -> list[list[ModelPart]]:
    """Return parts in their order, neighbouring layers of the same operators together."""
    groups = groupby(parts, lambda part: part.operators if LAYER_PART.match(part.name) else part.name)
    return [list(group) for _, group in groups]


def find_part(name: str, layers: int) -> str | None:
    """Return the part of the model that a node's name tells: `embedding`, `layer 3`, `head`, or None."""
    found = LAYER.match(name)
    if found is not None:  # bundles of old named the last norm like one layer more
        return f"layer {int(found[1])}" if int(found[1]) < layers else "head"
    return "embedding" if EMBEDDING.match(name) else "head" if HEAD.match(name) else None


def _typical(steps: Sequence[Sequence[GraphRun]]) -> list[tuple[NodeRun, float]]:
    """Return each node of the steps with its median time, and in which share of the steps it ran."""
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
    """Sum by part; a node whose name tells none belongs where the node before it does."""
    names = ["embedding", *(f"layer {i}" for i in range(layers)), "head"]
    nodes, us = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    operators: dict[str, list[str]] = {name: [] for name in names}
    told, part = set(), names[0]
    for node, often in typical:
        own = find_part(node.name, layers)
        if own is not None:
            part = own
            told.add(own)
        nodes[part] += often
        us[part] += often * node.us
        operators[part].append(node.operator)
    if not told >= set(names[1:-1]):
        return None
    return tuple(ModelPart(name, nodes[name], us[name], tuple(operators[name])) for name in names)


class _Weights:
    """Which matrix a node reads: by the node's name, else by the shape where only one kind of matrix has it."""

    def __init__(self, matrices: Sequence[Matrix]) -> None:
        self._by_name = {matrix.name: matrix for matrix in matrices}
        if "embedding" in self._by_name:
            self._by_name.setdefault("head", self._by_name["embedding"])
        self._by_shape: dict[tuple[int, int], list[Matrix]] = {}
        for matrix in matrices:
            self._by_shape.setdefault((matrix.columns, matrix.rows), []).append(matrix)

    def read_by(self, node: NodeRun) -> tuple[tuple[int, int] | None, int | None, float]:
        """Return (K, N), bits a weight, and bytes in memory of the matrix; (None, None, 0) for what reads none."""
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
    """Bytes in memory, where scales are float16 for our kernels and float32 for onnxruntime's."""
    return replace(matrix, scale_bits=16 if WeightFormat.from_op_type(node.operator) else 32).bytes()


def _node(event: Mapping[str, Any]) -> NodeRun:
    args = event["args"]
    operator = args["op_name"]
    fmt = WeightFormat.from_op_type(operator)
    shape = None
    if fmt is not None:
        shape = _our_product(args, fmt)
    elif operator in MATMUL_OPERATORS:
        shape = _product(args)
    return NodeRun(event["name"].removesuffix(SUFFIX), operator, event["dur"], shape)


def _product(args: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Return (M, K, N) where the second factor is a matrix; a kernel that repacked it does not list it."""
    inputs, outputs = ([_dims(each) for each in args.get(f"{side}_type_shape", ())] for side in ("input", "output"))
    if not inputs or not outputs or not inputs[0] or not outputs[0] or any(len(dims) > 2 for dims in inputs[1:2]):
        return None
    *rows, columns = inputs[0]
    return math.prod(rows), columns, outputs[0][-1]


def _our_product(args: Mapping[str, Any], fmt: WeightFormat) -> tuple[int, int, int]:
    """Return (M, K, N); gates and values of SwiGLU are twice as wide as the matrix, whose last block may be short.

    How many blocks it has shows in the scratch memory, which is the second output.
    """
    *rows, width = _dims(args["input_type_shape"][0])
    y, scratch = (_dims(each) for each in args["output_type_shape"][:2])
    count = math.prod(rows)
    whole = scratch[0] // (count * (fmt.block_size * fmt.code_bytes + QUANT_PARAM_BYTES)) * fmt.block_size
    return count, width // 2 if width > whole else width, y[-1]


def _dims(typed: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """Read one entry of a list of shapes: {"float": [1, 64]} -> [1, 64]."""
    return next(iter(typed.values()), ())


def _subtract_nested(nodes: list[tuple[float, float, NodeRun]]) -> Iterator[tuple[float, NodeRun]]:
    """Yield nodes by their start, each without what began inside it."""
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
