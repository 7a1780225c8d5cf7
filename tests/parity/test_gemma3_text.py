"""Gemma 3 against transformers: norms of queries and keys, and sliding layers with another rope."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LINEAR = {"rope_type": "linear", "factor": 4.0}
SMALL = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12}
CASES = {
    "default-pattern": {**SMALL, "num_hidden_layers": 7},
    "pattern-2": {**SMALL, "sliding_window_pattern": 2},
    "pattern-1": {**SMALL, "sliding_window_pattern": 1},
    "layer-types": {**SMALL, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "head-24": {**SMALL, "sliding_window_pattern": 2, "head_dim": 24},
    "head-40-biases": {**SMALL, "sliding_window_pattern": 3, "head_dim": 40, "attention_bias": True},
    "head-256-one-key-head": {**SMALL, "head_dim": 256, "num_key_value_heads": 1, "query_pre_attn_scalar": 256},
    "linear": {**SMALL, "sliding_window_pattern": 2, "rope_scaling": LINEAR},
    "linear-thetas-head-12": {
        **SMALL,
        "sliding_window_pattern": 2,
        "rope_scaling": LINEAR,
        "rope_theta": 5e4,
        "rope_local_base_freq": 100.0,
        "head_dim": 12,
    },
    "window-1-untied": {**SMALL, "sliding_window": 1, "sliding_window_pattern": 2, "tie_word_embeddings": False},
    "low-cap": {**SMALL, "sliding_window_pattern": 2, "final_logit_softcapping": 3.0},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("gemma3_text", options, tmp_path, export_to_cache)


def test_bfloat16_in_shards(tmp_path, export_to_cache):
    options = {**SMALL, "sliding_window_pattern": 2}
    families.check("gemma3_text", options, tmp_path, export_to_cache, dtype="bfloat16", shards=2)


def test_a_prompt_in_chunks_equals_one_pass(tmp_path, export_to_cache):
    options = {**SMALL, "sliding_window_pattern": 2, "rope_scaling": LINEAR, "max_position_embeddings": 640}
    families.compare_chunks(*families.make("gemma3_text", options, tmp_path, export_to_cache))
