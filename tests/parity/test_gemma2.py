"""Gemma 2 against transformers: norms around each branch, soft caps, alternating windows."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SMALL = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 20}
CASES = {
    "head-16": {**SMALL},
    "head-256": {**SMALL, "head_dim": 256, "num_hidden_layers": 2},
    "low-caps": {**SMALL, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "no-caps": {**SMALL, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    "scale-untied": {**SMALL, "query_pre_attn_scalar": 5, "tie_word_embeddings": False},
    "scale-odd-window-1": {**SMALL, "query_pre_attn_scalar": 23, "sliding_window": 1, "num_key_value_heads": 1},
    "biases-head-24": {**SMALL, "head_dim": 24, "attention_bias": True},
    "head-12-odd-width": {**SMALL, "head_dim": 12, "hidden_size": 52, "intermediate_size": 77},
    "layer-types": {**SMALL, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    "exact-gelu": {**SMALL, "hidden_activation": "gelu"},
    "silu": {**SMALL, "hidden_activation": "silu"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("gemma2", options, tmp_path, export_to_cache)


def test_bfloat16(tmp_path, export_to_cache):
    families.check("gemma2", SMALL, tmp_path, export_to_cache, dtype="bfloat16")
