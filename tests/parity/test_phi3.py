"""Phi 3 and 4 against transformers: projections stored as one, part of each head rotates, LongRoPE."""

from __future__ import annotations

import shutil

import families
import pytest

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import EdgelmError
from edgelm.runtime.prefix_file import add_prefix

pytestmark = pytest.mark.usefixtures("one_torch_thread")

HEAD_64 = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


def longrope(pairs, original=64):
    """Options with a context of four times the original."""
    factors = {"short_factor": [1 + i / pairs for i in range(pairs)], "long_factor": [2 + 3 * i for i in range(pairs)]}
    return {"original_max_position_embeddings": original, "rope_scaling": {"type": "longrope", **factors}}


CASES = {
    "plain": {},
    "window": {"sliding_window": 30},
    "window-1-tied": {"sliding_window": 1, "tie_word_embeddings": True},
    "one-key-head": {"num_key_value_heads": 1, "vocab_size": 509},
    "a-quarter-of-64": {**HEAD_64, "partial_rotary_factor": 0.25},
    "half-of-64": {**HEAD_64, "partial_rotary_factor": 0.5},
    "three-quarters-of-64": {**HEAD_64, "partial_rotary_factor": 0.75},
    "three-quarters-of-32": {**HEAD_64, "hidden_size": 64, "partial_rotary_factor": 0.75},
    "a-quarter-of-24": {**HEAD_64, "hidden_size": 48, "partial_rotary_factor": 0.25},
    "half-of-12": {"hidden_size": 48, "partial_rotary_factor": 0.5, "sliding_window": 25},
    "head-96": {**HEAD_64, "hidden_size": 192, "num_hidden_layers": 2},
    "longrope": {**longrope(8)},
    "longrope-window": {**longrope(8), "sliding_window": 20},
    "longrope-half-of-64": {**longrope(16), **HEAD_64, "partial_rotary_factor": 0.5},
    "longrope-three-quarters-of-32": {**longrope(12), **HEAD_64, "hidden_size": 64, "partial_rotary_factor": 0.75},
    "longrope-head-12": {**longrope(6), "hidden_size": 48},
    "longrope-not-exceeded": {**longrope(8), "original_max_position_embeddings": 256},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("phi3", options, tmp_path, export_to_cache)


@pytest.mark.parametrize("start", [50, 63, 64, 65])
@pytest.mark.parametrize("options", [longrope(8), {**longrope(6), "hidden_size": 48, "sliding_window": 20}])
def test_steps_across_the_original_context(options, start, tmp_path, export_to_cache):
    families.check("phi3", options, tmp_path, export_to_cache, start=start)


def test_bfloat16_in_shards(tmp_path, export_to_cache):
    options = {**longrope(16), **HEAD_64, "partial_rotary_factor": 0.5}
    families.check("phi3", options, tmp_path, export_to_cache, dtype="bfloat16", shards=2)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 300}])
@pytest.mark.parametrize("original", [64, 300])
def test_a_prompt_in_chunks_equals_one_pass(options, original, tmp_path, export_to_cache):
    options = {**longrope(8, original), "max_position_embeddings": 640, **options}
    families.compare_chunks(*families.make("phi3", options, tmp_path, export_to_cache))


@pytest.mark.parametrize("options", [longrope(8), {**longrope(6), "hidden_size": 48}])
def test_answers_together_equal_answers_alone(options, tmp_path, export_to_cache):
    families.compare_batch(families.make("phi3", options, tmp_path, export_to_cache)[1])


@pytest.mark.parametrize("options", [longrope(8), {**longrope(6), "hidden_size": 48, "sliding_window": 20}])
def test_reused_prefixes_have_the_same_rotary_factors(options, tmp_path, export_to_cache):
    families.compare_reuse(families.make("phi3", options, tmp_path, export_to_cache)[1])


@pytest.mark.parametrize("options", [longrope(8), {**longrope(6), "hidden_size": 48, "sliding_window": 20}])
def test_draft_tokens_across_the_original_context(options, tmp_path, export_to_cache):
    families.compare_guesses(families.make("phi3", options, tmp_path, export_to_cache)[1])


def test_a_conversation_continues_past_the_original_context(tmp_path, export_to_cache):
    bundle = families.make("phi3", longrope(8), tmp_path, export_to_cache)[1]
    prompt = families.random_prompt(200, 60)
    with edgelm.load(bundle, threads=1, max_batch=1) as model:
        first = model.generate(tokens=prompt, max_tokens=8, ignore_eos=True)
        longer = [*prompt, *first.tokens, *range(10)]
        second = model.generate(tokens=longer, max_tokens=8, ignore_eos=True)
    assert second.usage.cached_tokens == len(prompt) + 7  # computed anew when the answer outgrew 64 positions
    with edgelm.load(bundle, threads=1, max_batch=1, prefix_cache_mb=0, speculation=False) as model:
        assert model.generate(tokens=longer, max_tokens=8, ignore_eos=True).tokens == second.tokens


def test_a_static_prefix_is_for_the_original_context(tmp_path, export_to_cache):
    bundle = families.make("phi3", longrope(8), tmp_path, export_to_cache)[1]
    prompt = families.random_prompt(200, 200)
    with edgelm.load(bundle, threads=1, max_batch=1, prefix_cache_mb=0, speculation=False) as model:
        expected = [model.generate(tokens=prompt[:n], max_tokens=8, ignore_eos=True).tokens for n in (40, 60, 64, 65)]
    shutil.copytree(bundle, tmp_path / "prefixed")
    with pytest.raises(EdgelmError, match=r"64 tokens.* 63"):
        add_prefix(open_bundle(tmp_path / "prefixed"), prompt[:64])
    add_prefix(open_bundle(tmp_path / "prefixed"), prompt[:63])
    with edgelm.load(tmp_path / "prefixed", threads=1, max_batch=1, speculation=False) as model:
        found = [model.generate(tokens=prompt[:n], max_tokens=8, ignore_eos=True, seed=0) for n in (40, 60, 64, 65)]
    assert [done.tokens for done in found] == expected
    assert [done.usage.cached_tokens for done in found] == [39, 59, 63, 0]
