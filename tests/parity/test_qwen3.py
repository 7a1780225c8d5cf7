"""Qwen 3 against transformers: norms of queries and keys, a configured head size."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "plain": {"head_dim": 16},
    "tied": {"head_dim": 32, "tie_word_embeddings": True},
    "biases-head-24": {"head_dim": 24, "attention_bias": True},
    "head-12": {"head_dim": 12, "num_key_value_heads": 1},
    "head-40": {"head_dim": 40, "num_attention_heads": 3, "num_key_value_heads": 3},
    "head-96": {"head_dim": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
    "head-128": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "windows-of-later-layers": {
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "yarn-mscale": {"head_dim": 32, "rope_scaling": {**YARN, "mscale": 1.3, "mscale_all_dim": 0.4}},
    "yarn-attention-factor": {"head_dim": 32, "rope_scaling": {**YARN, "attention_factor": 0.7}},
    "yarn-not-truncated": {"head_dim": 64, "rope_scaling": {**YARN, "truncate": False, "beta_fast": 8, "beta_slow": 2}},
    "yarn-window-head-24": {
        "head_dim": 24,
        "rope_scaling": YARN,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 0,
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("qwen3", options, tmp_path, export_to_cache)


def test_answers_together_equal_answers_alone(tmp_path, export_to_cache):
    families.compare_batch(families.make("qwen3", {"head_dim": 24}, tmp_path, export_to_cache)[1])
