"""The int8 KV cache: onnxruntime's kernel against plain loops, and bundles with such a cache in the engine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.architectures.rope import RopeConfig
from edgelm_export.int8_kv.int8_cache_graph import MIN_ONNXRUNTIME, CacheScales, convert_cache_to_int8
from edgelm_export.int8_kv.ranges import max_over_positions
from naive_attention import Int8Layer
from onnx import TensorProto, helper, numpy_helper

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.errors import BundleError
from edgelm.runtime.ort import ORT_RELEASE, check_ort_version, load_graph
from edgelm.runtime.runner import open_runner
from edgelm.types import Request, SamplingParams

if tuple(map(int, MIN_ONNXRUNTIME.split("."))) > ORT_RELEASE:
    pytest.skip(f"needs onnxruntime {MIN_ONNXRUNTIME}", allow_module_level=True)

CAPACITY = 48


@dataclasses.dataclass
class Case:
    """One run of the kernel on rows that hold `past` positions each."""

    kv_heads: int
    groups: int
    size: int
    past: list[int]
    new: int
    window: int | None
    softcap: float | None
    rotary: bool
    seed: int

    def __post_init__(self):
        if len(self.past) > 1:
            self.new = 1  # the kernel supports only one new token for several rows

    def scales(self, generator):
        shape = self.kv_heads, self.size
        return CacheScales(*(generator.uniform(2, 5, shape).astype(np.float32) / 127 for _ in range(2)))


cases = st.builds(
    Case,
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.sampled_from([16, 32, 64]),
    past=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    new=st.integers(1, 9),
    window=st.none() | st.integers(1, 12),
    softcap=st.none() | st.floats(1, 30),
    rotary=st.booleans(),
    seed=st.integers(0, 999),
)


def attend(case, scales, packed, memory, tables):
    """Run the node on `packed`, float32 [B, new, (heads + 2 kv_heads) * size]; `memory` is replaced by the present."""
    heads, value = case.kv_heads * case.groups, helper.make_tensor_value_info
    options = {"local_window_size": case.window, "softcap": case.softcap}
    rotary = ["cos", "sin"] if case.rotary else []
    node = helper.make_node(
        "GroupQueryAttention",
        ["packed", "", "", "past.0.key", "past.0.value", "seqlens_k", "total", *rotary],
        ["out", "present.0.key", "present.0.value"],
        domain="com.microsoft",
        num_heads=heads,
        kv_num_heads=case.kv_heads,
        scale=case.size**-0.5,
        do_rotary=int(case.rotary),
        **{name: option for name, option in options.items() if option is not None},
    )
    shape = [len(case.past), case.kv_heads, CAPACITY, case.size]
    past, present = (
        [value(f"{when}.0.{part}", TensorProto.FLOAT, shape) for part in ("key", "value")]
        for when in ("past", "present")
    )
    inputs = [value("packed", TensorProto.FLOAT, packed.shape), *past]
    inputs += [value("seqlens_k", TensorProto.INT32, [len(case.past)]), value("total", TensorProto.INT32, [1])]
    constants = [numpy_helper.from_array(table, name) for name, table in zip(rotary, tables, strict=False)]
    graph = helper.make_graph(
        [node], "one", inputs, [value("out", TensorProto.FLOAT, None), *present], initializer=constants
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = convert_cache_to_int8(helper.make_model(graph, opset_imports=opsets, ir_version=10), [scales])
    lengths = np.array(case.past, np.int32) + case.new
    feeds = {"packed": packed, "seqlens_k": lengths - 1, "total": lengths.max(keepdims=True)}
    feeds |= {f"past.0.{part}": array for part, array in memory.items()}
    out, key, new_value = load_graph(model.SerializeToString(), 1).run(None, feeds)
    memory.update(key=key, value=new_value)
    return out


@settings(max_examples=40)
@given(case=cases)
def test_the_kernel_attends_over_rounded_keys_and_values(case):
    """The result equals plain loops, and differs from float32 attention by at most the rounding of half a code."""
    generator = np.random.default_rng(case.seed)
    scales, heads = case.scales(generator), case.kv_heads * case.groups
    rows, width = len(case.past), (heads + 2 * case.kv_heads) * case.size
    longest = max(case.past) + case.new
    whole = generator.normal(size=(rows, longest, width)).astype(np.float32)
    angles = np.outer(np.arange(CAPACITY), 100.0 ** -(np.arange(case.size // 2) / case.size))
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    naive = [
        Int8Layer(heads, case.kv_heads, case.size, scales, tables if case.rotary else None, case.window, case.softcap)
        for _ in range(rows)
    ]
    memory = {part: np.zeros((rows, case.kv_heads, CAPACITY, case.size), np.int8) for part in ("key", "value")}
    for row, past in enumerate(case.past):
        for at in range(past):
            naive[row].step(whole[row, at])
        for part in ("key", "value"):
            for at, codes in enumerate(naive[row].codes[part]):
                memory[part][row, :, at] = codes
    packed = np.stack([whole[row, past : past + case.new] for row, past in enumerate(case.past)])
    out = attend(case, scales, packed, memory, tables)
    for row, past in enumerate(case.past):
        for i in range(case.new):
            step = naive[row].step(packed[row, i])
            for part in ("key", "value"):
                written = memory[part][row, :, past + i].astype(int)
                off = written != naive[row].codes[part][-1]
                assert np.abs(written - naive[row].codes[part][-1]).max() <= 1
                assert off.mean() < 0.02  # float32 rounds a tie differently
            assert np.abs(out[row, i] - step.out).max() < 2e-3 + (0.05 if off.any() else 0)
            assert (np.abs(step.out - step.exact) <= step.bound + 1e-9).all()
    assert (np.concatenate([memory["key"], memory["value"]]) != 0).any()


@settings(max_examples=30)
@given(
    theta=st.sampled_from([100.0, 10000.0]),
    context=st.integers(1, 300),
    rotary=st.sampled_from([4, 8]),
    length=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_the_maximum_of_keys_covers_all_positions(theta, context, rotary, length, seed):
    length = min(length, context)
    plain = np.random.default_rng(seed).normal(size=(2, length, 8)).astype(np.float32)
    cosines, sines = RopeConfig(theta).tables(context, rotary)
    everywhere = np.stack(
        [np.stack([rotated(plain[:, n], cosines[p], sines[p]) for n in range(length)], 1) for p in range(context)]
    )
    keys = np.stack([everywhere[n][:, n] for n in range(length)], 1)
    found = max_over_positions(keys, RopeConfig(theta), context, rotary)
    largest = np.abs(everywhere).max(axis=0)
    assert (found >= largest - 1e-4).all()
    radius = np.hypot(plain[..., : rotary // 2], plain[..., rotary // 2 : rotary])
    slack = np.concatenate([radius, radius], -1) * (1 - np.cos(0.5))  # positions differ by at most one radian
    assert (found[..., :rotary] <= largest[..., :rotary] + slack + 1e-4).all()
    assert np.array_equal(found[..., rotary:], np.abs(plain[..., rotary:]))


def rotated(keys, cosines, sines):
    half = len(cosines)
    first, second = keys[:, :half], keys[:, half : 2 * half]
    turned = [first * cosines - second * sines, second * cosines + first * sines]
    return np.concatenate([*turned, keys[:, 2 * half :]], -1)


# --- bundles ---


@pytest.fixture(scope="module", params=["odd heads", "float32", "int4"])
def quantized(request, tiny_checkpoint, export_to_cache):
    """Bundles with an int8 KV cache: with heads of 12, which a node rotates and pads, and with usual heads."""
    checkpoint = tiny_checkpoint(tied=False, **({"head_size": 12} if request.param == "odd heads" else {}))
    return open_bundle(export_to_cache(checkpoint, quant="int4" if request.param == "int4" else "fp32", kv="int8"))


def test_the_manifest_describes_the_cache(quantized):
    manifest = quantized.manifest
    size = {12: 16}.get(manifest.shapes["head_size"], manifest.shapes["head_size"])
    assert (manifest.cache.bits, manifest.cache.head_size) == (8, size)
    assert manifest.cache.bytes_per_token() == 2 * 2 * 2 * size  # layers, kv heads
    assert manifest.needs_onnxruntime == MIN_ONNXRUNTIME
    segment = open_runner(quantized, rows=1, threads=1).read_row(0, 0, 3)
    assert {array.dtype for array in segment} == {np.dtype(np.int8)}
    assert sum(array.nbytes for array in segment) == 3 * manifest.cache.bytes_per_token()


@settings(max_examples=10)
@given(seed=st.integers(0, 999), lengths=st.lists(st.integers(1, 90), min_size=2, max_size=4), steps=st.integers(1, 6))
def test_rows_have_the_same_logits_in_a_batch_and_alone(seed, lengths, steps, quantized):
    runner = open_runner(quantized, rows=len(lengths) + 1, threads=1)
    alone = open_runner(quantized, rows=1, threads=1)
    generator = np.random.default_rng(seed)
    tokens = [generator.integers(2, 300, length + steps) for length in lengths]
    for row, (text, length) in enumerate(zip(tokens, lengths, strict=True)):
        runner.prefill(row, text[:length], 0)
    batch = [
        runner.decode(
            np.array([text[n + i] for text, n in zip(tokens, lengths, strict=True)]), np.array(lengths, np.int32) + i
        ).copy()
        for i in range(steps)
    ]
    for row, (text, length) in enumerate(zip(tokens, lengths, strict=True)):
        alone.prefill(0, text[:length], 0)
        for i in range(steps):
            found = alone.decode(text[length + i : length + i + 1], np.array([length + i], np.int32))[0]
            assert near(batch[i][row], found)


@settings(max_examples=10)
@given(length=st.integers(1, 60), cuts=st.lists(st.integers(1, 60), max_size=4), seed=st.integers(0, 99))
def test_a_row_written_from_segments_equals_a_computed_row(length, cuts, seed, quantized):
    runner = open_runner(quantized, rows=2, threads=1)
    tokens = np.random.default_rng(seed).integers(2, 300, length + 1)
    runner.prefill(0, tokens[:-1], 0)
    ends = sorted({*(cut for cut in cuts if cut < length), length})
    runner.write_row(1, [runner.read_row(0, start, end) for start, end in zip([0, *ends], ends, strict=False)])
    anew = runner.prefill(0, tokens[-1:], length).copy()
    assert np.array_equal(runner.prefill(1, tokens[-1:], length), anew)
    runner.copy_row(0, 1, length)
    assert np.array_equal(runner.prefill(1, tokens[-1:], length), anew)


def test_a_cached_prefix_gives_the_same_completion(quantized):
    engines = [Engine(quantized, EngineOptions(threads=1, max_batch=2, prefix_cache_mb=mb)) for mb in (0, 1)]
    for turn in range(4):
        prompt = (*range(5, 45), 50 + turn)
        anew, reused = (run(engine, prompt) for engine in engines)
        assert reused.usage.cached_tokens == (40 if turn else 0)
        gaps = [entry.top[0][1] - entry.top[1][1] for entry in anew.logprobs]
        sure = next((i for i, gap in enumerate(gaps) if gap < 0.1), len(gaps))
        assert reused.tokens[:sure] == anew.tokens[:sure]
        assert sure > 0


def run(engine, prompt):
    engine.add(Request("one", SamplingParams(max_tokens=6, logprobs=2, ignore_eos=True), tokens=prompt), 0.0)
    while True:
        for chunk in engine.step():
            if chunk.done:
                return chunk.completion


def near(one, other):
    """Compare logits: a batch may round a code differently, which changes them a little, with int4 weights more."""
    return np.abs(one - other).max() < 0.05 * np.abs(other).max()


def test_an_older_onnxruntime_is_refused_in_one_line(quantized, monkeypatch):
    monkeypatch.setattr("edgelm.runtime.ort.ORT_RELEASE", (1, 27))
    with pytest.raises(BundleError, match=rf"onnxruntime {MIN_ONNXRUNTIME} .*--kv fp32") as caught:
        open_runner(quantized, rows=1)
    assert "\n" not in str(caught.value)
    check_ort_version(None, "an old bundle")
    check_ort_version("1.27", "another")
