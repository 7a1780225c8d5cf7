"""The attention kernels, compiled for each target that this processor supports, against plain loops."""

from __future__ import annotations

import itertools
import platform
from dataclasses import replace

import numpy as np
import pytest
from attention_cases import Case, check_case
from attention_nodes import ours, run, session_of
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import binding
from naive_kernel_attention import Shape

from edgelm.kernels.abi import ERROR_MESSAGES, InputErrorCode
from edgelm.kernels.compiler import compile_kernels
from edgelm.kernels.custom_ops import CustomOpLibrary
from edgelm.kernels.ir.targets import TARGETS
from edgelm.system.digest import file_sha256

seeds = st.integers(0, 2**32 - 1)


def runnable(target):
    """Return whether this processor supports a target."""
    features = binding.get_host_cpu_features()
    return target.triple.startswith(platform.machine()) and all(features.get(name) for name in target.features)


@pytest.fixture(scope="module", params=[target for target in TARGETS if runnable(target)], ids=lambda t: t.name)
def operators(request, tmp_path_factory):
    target = request.param
    folder = tmp_path_factory.mktemp("attention")
    features = ",".join(f"+{name}" for name in target.features)
    (folder / "kernels.so").write_bytes(compile_kernels(target, [], "", features))
    (folder / "data").write_bytes(b"none")
    library = folder / "kernels.so"
    return CustomOpLibrary(library, [], folder / "data", file_sha256(library))


@st.composite
def shapes(draw, sizes=(16, 32, 48, 64, 80, 112)):
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 7), (3, 2), (1, 8), (2, 1), (1, 32)]))
    size = draw(st.sampled_from(sizes))
    return Shape(
        kv_heads * group, kv_heads, size,
        half=draw(st.sampled_from([0, size // 2, size // 4, 3])),
        window=draw(st.sampled_from([0, 0, 1, 5, 40, 130])),
        softcap=draw(st.sampled_from([0.0, 0.0, 20.0])),
        scale=size**-0.5,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(1, 3), st.booleans(), st.booleans(), seeds)
def test_a_step_equals_plain_loops(operators, shape, batch, packed, has_positions, seed):
    check_case(operators, Case(shape, seed, batch=batch, has_positions=has_positions), packed=packed)


@settings(max_examples=40, deadline=None)
@given(shapes(sizes=(16, 48, 64)), st.integers(2, 30), st.booleans(), st.booleans(), seeds)
def test_a_prompt_equals_plain_loops(operators, shape, tokens, packed, has_positions, seed):
    check_case(operators, Case(shape, seed, tokens=tokens, longest=140, has_positions=has_positions), packed=packed)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([127, 128, 129, 255, 256, 257, 384]), st.sampled_from([0, 1, 127, 128, 129, 200]), seeds)
def test_lengths_around_a_tile_are_correct(operators, length, window, seed):
    shape = Shape(2, 1, 16, half=8, window=window, scale=0.25)
    check_case(operators, Case(shape, seed, lengths=[length]))
    check_case(operators, Case(shape, seed, lengths=[length - 20], tokens=21))


@settings(max_examples=10, deadline=None)
@given(shapes(), st.integers(1, 5), seeds)
def test_a_past_in_separate_memory_is_copied(operators, shape, tokens, seed):
    check_case(operators, Case(shape, seed, batch=2, tokens=tokens, longest=30), in_place=False)


@pytest.mark.parametrize("size", [128, 256])
def test_large_heads_are_correct(operators, size):
    for tokens in (1, 9):
        check_case(
            operators, Case(Shape(4, 2, size, half=size // 2, scale=size**-0.5), 0, tokens=tokens, lengths=[140])
        )


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(2, 5), st.integers(1, 3), seeds)
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(operators, shape, batch, threads, seed):
    case = Case(shape, seed, batch=batch)
    feeds = case.feeds()
    session = session_of(ours(shape, feeds), feeds, operators=operators, threads=threads)
    together = run(session, feeds)
    for row in range(batch):
        alone = case.feeds(rows=slice(row, row + 1))
        np.testing.assert_array_equal(run(session, alone)[0], together[row])


@settings(max_examples=60, deadline=None)
@given(
    shapes(sizes=(16, 48, 64)),
    st.integers(2, 300),
    st.lists(st.sampled_from([1, 1, 2, 3, 5, 10, 11, 33, 100]), min_size=1, max_size=4),
    st.integers(1, 3),
    seeds,
)
def test_a_prompt_in_chunks_gives_the_same_bits(operators, shape, tokens, sizes, threads, seed):
    """A token's result does not depend on the number of tokens in the pass, nor on the kernel that computes it."""
    case = Case(shape, seed, tokens=tokens, longest=150)
    feeds = case.feeds()
    session = session_of(ours(shape, feeds), feeds, operators=operators, threads=threads)
    whole = run(session, feeds)
    chunked = case.feeds()
    start = 0
    for size in itertools.cycle(sizes):
        end = min(start + size, tokens)
        chunk = {**chunked, "query": np.ascontiguousarray(chunked["query"][:, start:end])}
        chunk["seqlens"] = (case.lengths + end - 1).astype(np.int32)
        np.testing.assert_array_equal(run(session, chunk), whole[:, start:end])
        start = end
        if start == tokens:
            break
    np.testing.assert_array_equal(chunked["past_key"], feeds["past_key"])
    np.testing.assert_array_equal(chunked["past_value"], feeds["past_value"])


@pytest.mark.parametrize("seqlens", [-3, 1000, 2**31 - 1])
@pytest.mark.parametrize("tokens", [1, 5])
def test_lengths_outside_the_kv_cache_are_refused(operators, seqlens, tokens):
    """And no row of the KV cache is written."""
    case = Case(Shape(2, 1, 16, scale=0.25), 0, batch=3, tokens=tokens, lengths=[30, 30, 30])
    feeds = case.feeds(rows=slice(1, 2))
    memory = np.nan_to_num(case.past)
    before = memory.copy()
    feeds |= {"past_key": memory[0][1:2], "past_value": memory[1][1:2], "seqlens": np.array([seqlens], np.int32)}
    session = session_of(ours(case.shape, feeds), feeds, operators=operators)
    with pytest.raises(RuntimeError, match=ERROR_MESSAGES[InputErrorCode.LENGTHS]):
        run(session, feeds)
    np.testing.assert_array_equal(memory, before)


@pytest.mark.parametrize("size", [1e-30, 30.0, 1e3])
def test_scores_of_any_size_are_correct(operators, size):
    case = Case(Shape(3, 1, 16, scale=0.25), 0, lengths=[200])
    case.packed[:, :, :3] *= np.float32(size)
    check_case(operators, case)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_nan_reaches_only_its_own_output(operators, value, softcap):
    case = Case(Shape(2, 1, 16, scale=0.25, softcap=softcap), 0, batch=3, lengths=[5, 150, 300])
    case.packed[1, 0, 0, 3] = value
    feeds = case.feeds()
    found = run(session_of(ours(case.shape, feeds), feeds, operators=operators), feeds).reshape(3, 2, 16)
    if not (softcap and np.isinf(value)):  # the softcap makes an infinite score finite
        assert np.isnan(found[1, 0]).all()
    assert np.isfinite(found[[0, 2]]).all()
    assert np.isfinite(found[1, 1]).all()


def test_the_result_equals_onnxruntimes_attention(operators):
    helper = pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'").helper
    shape = Shape(6, 2, 64, half=32, scale=0.125)
    for tokens, length in ((1, 200), (1, 0), (70, 90)):
        case = Case(shape, tokens, tokens=tokens, lengths=[length])
        case.past = np.nan_to_num(case.past)
        feeds = case.feeds()
        node = helper.make_node(
            "GroupQueryAttention", ["query", "", "", "past_key", "past_value", "seqlens", "total", "cos", "sin"],
            ["y", "present_key", "present_value"], domain="com.microsoft", num_heads=6, kv_num_heads=2, do_rotary=1,
            scale=0.125,
        )  # fmt: skip
        theirs = {**case.feeds(), "total": np.array([length + tokens], np.int32)}
        expected = run(session_of(node.SerializeToString(), theirs), theirs)
        found = run(session_of(ours(shape, feeds), feeds, operators=operators), feeds)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        for part in ("past_key", "past_value"):
            np.testing.assert_allclose(feeds[part], theirs[part], rtol=1e-6, atol=1e-6)


def test_a_window_includes_the_position_itself(operators):
    """With a window of 1 a token attends only to itself."""
    case = Case(replace(Shape(2, 1, 16, scale=1.0), window=1), 0, tokens=4, lengths=[130])
    feeds = case.feeds()
    found = run(session_of(ours(case.shape, feeds), feeds, operators=operators), feeds).reshape(4, 2, 16)
    np.testing.assert_allclose(found, np.repeat(case.packed[0, :, 3:4], 2, axis=1), rtol=1e-6)
