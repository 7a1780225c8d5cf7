"""A bundle with a static prefix gives the same completions as without one, and reports the cached tokens."""

from __future__ import annotations

import shutil
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.runtime.prefix_file import add_prefix
from edgelm.text.static_prompt import tokenize_prefix
from edgelm.text.tokenizer import Tokenizer
from edgelm.types import Request, SamplingParams


@pytest.fixture(scope="module")
def opened(float32_bundle, tmp_path_factory):
    """A copy of the bundle with a static prefix longer than a prefill chunk."""
    root = tmp_path_factory.mktemp("static") / "bundle"
    shutil.copytree(float32_bundle, root)
    bundle = open_bundle(root)
    length = min(PREFILL_CHUNK + 20, bundle.manifest.context // 2)
    return add_prefix(bundle, np.random.default_rng(1).integers(2, 300, length).tolist(), threads=1)


@pytest.fixture(scope="module")
def plain(float32_bundle):
    return Engine(open_bundle(float32_bundle), EngineOptions(threads=1, max_batch=2, prefix_cache_mb=0))


@pytest.fixture(scope="module", params=[0, 1, 64])
def engine(opened, request):
    """Engines with no prefix cache, a small one, and a large one."""
    return Engine(opened, EngineOptions(threads=1, max_batch=2, prefix_cache_mb=request.param))


def run(engine, *requests):
    for request in requests:
        engine.add(request, time.monotonic())
    found = {}
    while engine.queued or engine.active:
        found |= {chunk.id: chunk.completion for chunk in engine.step() if chunk.done}
    return [found[request.id] for request in requests]


@st.composite
def prompts(draw, max_length=60):
    """Share of the static prefix with which a prompt begins, in [0, 1]; seed and length of the rest."""
    share = draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1))
    return share, draw(st.integers(0, 2**32)), draw(st.integers(1, max_length))


def build_prompt(opened, share, seed, length):
    """Return the prompt and the number of its tokens that are cached: the last token is always computed."""
    static = opened.manifest.prefix.tokens
    split = round(share * len(static))
    rest = np.random.default_rng(seed).integers(2, 300, length).tolist()
    tokens = (*static[:split], *rest)
    while split < min(len(static), len(tokens)) and tokens[split] == static[split]:
        split += 1
    return tokens, min(split, len(tokens) - 1)


@settings(max_examples=40)
@given(asked=st.lists(prompts(), min_size=1, max_size=3), seed=st.none() | st.integers(0, 2**40))
def test_completions_are_the_same_as_without_a_prefix(plain, engine, opened, asked, seed):
    temperature = 0.0 if seed is None else 0.8
    sampling = SamplingParams(max_tokens=12, temperature=temperature, seed=seed, ignore_eos=True)
    made = [build_prompt(opened, *each) for each in asked]
    requests = [Request(f"{i}", sampling, tokens=tokens) for i, (tokens, _) in enumerate(made)]
    found, expected = run(engine, *requests), run(plain, *requests)
    for (tokens, known), one, other in zip(made, found, expected, strict=True):
        assert (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
        assert one.usage.prompt_tokens == len(tokens)
        assert one.usage.cached_tokens >= known
        if seed is not None or engine._prefix_cache._trees[False]._capacity == 0:
            assert one.usage.cached_tokens == known
        assert other.usage.cached_tokens == 0


def test_the_first_request_uses_the_prefix(opened):
    engine = Engine(opened, EngineOptions(threads=1, max_batch=1, prefix_cache_mb=0))
    static = opened.manifest.prefix.tokens
    done = run(engine, Request("one", SamplingParams(max_tokens=1), tokens=(*static, 5)))[0]
    assert done.usage.cached_tokens == len(static)


@settings(max_examples=20)
@given(before=st.lists(prompts(), max_size=3), asked=prompts(), seed=st.integers(0, 2**40))
def test_the_passes_of_a_seeded_request_do_not_depend_on_earlier_requests(opened, before, asked, seed):
    tokens, known = build_prompt(opened, *asked)
    sampling = SamplingParams(max_tokens=6, temperature=0.8, seed=seed, ignore_eos=True)
    engine = Engine(opened, EngineOptions(threads=1, max_batch=1))
    run(
        engine,
        *(
            Request(f"{i}", SamplingParams(max_tokens=4), tokens=build_prompt(opened, *each)[0])
            for i, each in enumerate([*before, asked])
        ),
    )
    sizes = []
    prefill = engine.runner.prefill
    engine.runner.prefill = lambda row, ids, *rest, **more: (sizes.append(len(ids)), prefill(row, ids, *rest, **more))[
        1
    ]
    done = run(engine, Request("seeded", sampling, tokens=tokens))[0]
    left = len(tokens) - known
    assert sizes == [min(PREFILL_CHUNK, left - at) for at in range(0, left, PREFILL_CHUNK)]
    assert done.usage.cached_tokens == known


WORDS = st.text("abcdefghij ABC.,!?\n0123456789é🙂", max_size=30)


@given(
    opening=st.lists(
        st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "user"]), WORDS),
        min_size=1,
        max_size=4,
    ),
    following=st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=20),
)
def test_chats_that_begin_with_the_prefix_begin_with_its_tokens(bundle, opening, following):
    tokenizer = Tokenizer.of_bundle(open_bundle(bundle, verify=False))
    tokens = tokenize_prefix(opening, tokenizer)
    whole = tokenizer.render_chat([*opening, {"role": "user", "content": following}])
    assert tokenizer.encode(whole, add_special_tokens=False)[: len(tokens)] == tokens
    assert len(tokens) > 0


@given(text=WORDS, following=WORDS)
def test_prompts_that_begin_with_the_text_begin_with_its_tokens(bundle, text, following):
    """Except the last token, which the following text may extend."""
    tokenizer = Tokenizer.of_bundle(open_bundle(bundle, verify=False))
    tokens = tokenize_prefix(f"{text} .", tokenizer)
    assert tokenizer.encode(f"{text} .{following}")[: len(tokens) - 1] == tokens[:-1]
