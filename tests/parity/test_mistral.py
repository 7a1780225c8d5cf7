"""Mistral against transformers: every layer has a sliding window, or none has."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CASES = {
    "window": {"sliding_window": 24},
    "window-1": {"sliding_window": 1},
    "window-2-head-24": {"sliding_window": 2, "head_dim": 24},
    "window-longer-than-context": {"sliding_window": 1000},
    "no-window": {"sliding_window": None, "head_dim": 8},
    "tied-one-key-head": {"sliding_window": 30, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 12},
    "ministral": {"sliding_window": 40, "head_dim": 40, "rope_theta": 1e8, "vocab_size": 509},
    "gelu": {"sliding_window": 24, "hidden_act": "gelu"},
    "relu": {"sliding_window": None, "hidden_act": "relu"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("mistral", options, tmp_path, export_to_cache)


def test_bfloat16_in_shards(tmp_path, export_to_cache):
    families.check("mistral", {"sliding_window": 24}, tmp_path, export_to_cache, dtype="bfloat16", shards=3)


@pytest.mark.parametrize("options", [{"sliding_window": 24}, {"sliding_window": 300, "head_dim": 24}])
def test_a_prompt_in_chunks_equals_one_pass(options, tmp_path, export_to_cache):
    options = {**options, "max_position_embeddings": 640}
    families.compare_chunks(*families.make("mistral", options, tmp_path, export_to_cache))


def test_answers_together_equal_answers_alone(tmp_path, export_to_cache):
    families.compare_batch(families.make("mistral", {"sliding_window": 24}, tmp_path, export_to_cache)[1])


def test_reused_prefixes_give_the_same_answers(tmp_path, export_to_cache):
    families.compare_reuse(families.make("mistral", {"sliding_window": 24}, tmp_path, export_to_cache)[1])


def test_draft_tokens_give_the_same_answers(tmp_path, export_to_cache):
    families.compare_guesses(families.make("mistral", {"sliding_window": 24}, tmp_path, export_to_cache)[1])
