"""The summary of a profile: every event is counted exactly once and in its place."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgelm.bench.profiler import _phase, _PhaseTimes
from edgelm.bench.trace import LAYER_PART, GraphRun, find_part, group_layers, parse_runs, summarize_steps
from edgelm.bundle.manifest import KVCacheShape, Manifest, Matrix

LAYERS = 3
MATRICES = (
    Matrix("embedding", 64, 32, 4, 16, scale_bits=16),
    *(Matrix(f"layer.{i}.qkv", 48, 32, 8 if i else 4, 32, scale_bits=16) for i in range(LAYERS)),
    Matrix("layer.0.down", 32, 96, 32),
)
INSIDE = [f"layer.{i}.{part}" for i in range(LAYERS) for part in ("attention.out", "mlp.normed", "gated", "qkv.out")]
NAMES = ["embedded", "hidden", *INSIDE, "attention.chosen", "Sigmoid_7", "final.normed", "logits"]
OPERATORS = ["MatMulNBits", "MatMul", "Mul", "GroupQueryAttention", "If"]
SHAPES = [(32, 64), (32, 48), (96, 32), (5, 7)]


def manifest(via="native"):
    return Manifest(
        architecture="any",
        context=64,
        vocab_size=64,
        cache=KVCacheShape("shared", LAYERS, 1, 8),
        quant="mixed",
        matrices=MATRICES,
        bos_token=None,
        eos_tokens=(),
        parameters=1,
        shapes={},
        via=via,
    )


@st.composite
def profiles(draw):
    """Consecutive runs as in onnxruntime's profile: events; time, node time and number of nodes of each run."""
    at, events, expected = draw(st.integers(0, 50)), [], []

    def node(start, us):
        rows, (columns, width) = draw(st.integers(1, 9)), draw(st.sampled_from(SHAPES))
        args = {"op_name": draw(st.sampled_from(OPERATORS)), "node_index": "0"}
        args["input_type_shape"] = [{"float": [1, rows, columns]}]
        args["output_type_shape"] = [{"float": [1, rows, width]}]
        name = f"{draw(st.sampled_from(NAMES))}_kernel_time"
        events.append({"cat": "Node", "name": name, "ts": start, "dur": us, "args": args})

    for _ in range(draw(st.integers(1, 5))):
        begun, busy, count = at, 0, 0
        at += draw(st.integers(0, 5))
        for us in draw(st.lists(st.integers(0, 400), max_size=12)):
            node(at, us)
            count, busy = count + 1, busy + us
            if us > 2 and draw(st.booleans()):  # a branch: its nodes run inside this one
                node(at + 1, us - 2)
                count += 1
            at += us + draw(st.integers(1, 9))
        span = {"cat": "Session", "ts": begun, "dur": at - begun, "args": {}}
        events.append({**span, "name": "SequentialExecutor::Execute"})
        events.append({**span, "name": "model_run"})
        expected.append((at - begun, busy, count))
        at += draw(st.integers(1, 40))
    events.append({"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 3, "args": {}})
    return events, expected


@given(profiles())
def test_every_node_is_in_its_run_once(profile):
    events, expected = profile
    runs = parse_runs(events)
    assert [(run.us, len(run.nodes)) for run in runs] == [(us, count) for us, _, count in expected]
    for run, (us, busy, _) in zip(runs, expected, strict=True):
        assert sum(node.us for node in run.nodes) == busy <= us  # nested nodes are not counted twice


@given(profiles(), st.randoms(use_true_random=False))
def test_the_order_of_events_does_not_matter(profile, random):
    events, _ = profile
    shuffled = list(events)
    random.shuffle(shuffled)
    starts = [event["ts"] for event in events if event["cat"] == "Node"]
    assume(len(set(starts)) == len(starts))
    assert parse_runs(shuffled) == parse_runs(events)


@given(profiles())
def test_nodes_outside_every_run_are_omitted(profile):
    events, _ = profile
    end = max(event["ts"] + event["dur"] for event in events)
    last = next(event for event in reversed(events) if event["name"] == "model_run")
    later = {"cat": "Node", "name": "x_kernel_time", "ts": end + 1, "dur": 2, "args": {"op_name": "Mul"}}
    assert last["ts"] + last["dur"] <= end
    assert parse_runs([*events, later]) == parse_runs(events)


@given(profiles(), st.sampled_from(["native", "optimum"]))
def test_sums_are_conserved(profile, via):
    events, expected = profile
    summary = summarize_steps([parse_runs(events)], manifest(via))  # one step of several runs
    assert summary.run_us == pytest.approx(sum(us for us, _, _ in expected))
    assert summary.nodes_us == pytest.approx(sum(busy for _, busy, _ in expected))
    for table in [summary.operators, *([summary.parts] if summary.parts else [])]:
        assert sum(each.nodes for each in table) == sum(nodes for *_, nodes in expected)
        assert sum(each.us for each in table) == pytest.approx(summary.nodes_us)
        shares = [summary.share(each.us) for each in table]
        assert all(0 <= share <= 1 for share in shares)
        assert math.fsum(shares) == pytest.approx(1 if summary.nodes_us else 0)
    assert list(summary.operators) == sorted(summary.operators, key=lambda each: -each.us)
    keys = [(each.operator, each.shape, each.bits) for each in summary.operators]
    assert len(set(keys)) == len(keys)


@given(profiles())
def test_steps_with_different_nodes_are_averaged(profile):
    events, expected = profile
    runs = parse_runs(events)
    summary = summarize_steps([[run] for run in runs], manifest())
    for table in [summary.operators, *([summary.parts] if summary.parts else [])]:
        nodes = sum(nodes for *_, nodes in expected)
        assert len(runs) * sum(each.nodes for each in table) == pytest.approx(nodes)
        assert sum(each.us for each in table) == pytest.approx(summary.nodes_us)
    assert summary.between_us == median(us - busy for us, busy, _ in expected)


@given(profiles(), st.integers(1, 4), st.data())
def test_interrupted_steps_have_no_effect(profile, half, data):
    runs = parse_runs(profile[0])
    slow = [GraphRun(run.us + 9e3, tuple(replace(node, us=node.us + 4e3) for node in run.nodes)) for run in runs]
    order = data.draw(st.permutations([runs] * (half + 1) + [slow] * half))
    assert summarize_steps(order, manifest()) == summarize_steps([runs], manifest())


@given(profiles())
def test_bytes_are_those_of_the_matrices_in_memory(profile):
    runs = parse_runs(profile[0])
    summary = summarize_steps([runs], manifest())
    total = 0.0
    for node in (node for run in runs for node in run.nodes):
        if node.operator not in ("MatMulNBits", "MatMul") or node.shape[1:] == (5, 7):
            continue
        layer = node.name.split(".")[1] if node.name.endswith(".qkv.out") else ""
        if node.shape[1:] == (32, 64):  # codes, and 2 scales of 4 bytes a row
            total += 64 * (16 + 2 * 4)
        elif node.shape[1:] == (96, 32):
            total += 4 * 96 * 32
        else:  # the name gives the matrix; without a name it is the mean of the three
            sizes = [48 * (bits * 32 // 8 + 4) for bits in (4, 8, 8)]
            total += sizes[int(layer)] if layer else sum(sizes) / 3
    assert sum(each.bytes for each in summary.operators) == pytest.approx(total)


@given(profiles())
def test_parts_are_in_the_order_of_the_model_or_none(profile):
    runs = parse_runs(profile[0])
    seen = {find_part(node.name, LAYERS) for run in runs for node in run.nodes}
    layers = [f"layer {i}" for i in range(LAYERS)]
    parts = summarize_steps([[run] for run in runs], manifest()).parts
    assert (parts is None) == (not seen >= set(layers))
    if parts is None:
        return
    assert [part.name for part in parts] == ["embedding", *layers, "head"]
    groups = group_layers(parts)
    assert [part for group in groups for part in group] == list(parts)
    for group in groups:
        assert len({part.operators for part in group}) == 1
        assert len(group) == 1 or all(LAYER_PART.match(part.name) for part in group)


@given(st.integers(0, 200), st.integers(1, 120), st.sampled_from(["qkv.out", "attention.out/Fused", "gate", "normed"]))
def test_a_name_gives_its_layer(layer, layers, rest):
    expected = f"layer {layer}" if layer < layers else "head"
    assert find_part(f"layer.{layer}.{rest}", layers) == expected
    assert find_part(f"/model/layers.{layer}/{rest}", layers) is None
    assert find_part(f"player.{layer}.{rest}", layers) is None


def test_a_profile_without_runs():
    assert parse_runs([]) == []
    assert summarize_steps([[GraphRun(7.0, ())]], manifest()).share(0.0) == 0.0


@given(st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=3), min_size=2, max_size=20), st.data())
def test_a_step_is_summarized_with_its_own_runs(times, data):
    runs = max(map(len, times))  # runs per step; the time outside them is 0, 10, 20 ... us
    times = [[*step, *[1] * (runs - len(step))] for step in times]
    skipped = data.draw(st.integers(0, len(times) - 1))
    plain = _PhaseTimes("decode", 2, 1, 5, runs, skipped, [1.0, 5.0, 4.0])
    timed = replace(plain, us=[sum(step) + 10.0 * i for i, step in enumerate(times[skipped:])])
    following = iter([*(GraphRun(us, ()) for step in times for us in step), GraphRun(7.0, ())])
    phase = _phase(plain, timed, following, manifest())
    assert (phase.plain_us, phase.outside_us) == (4, 5.0 * (len(times) - skipped - 1))
    assert phase.typical_step.run_us == median(sum(step) for step in times[skipped:])
    assert next(following).us == 7  # the next phase follows
