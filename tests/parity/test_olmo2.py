"""OLMo 2 against transformers: norms after the branches only, and of whole query and key projections."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CASES = {
    "plain": {},
    "tied-one-key-head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "num_key_value_heads": 4},
    "head-20": {"hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1},
    "head-12": {"hidden_size": 48, "vocab_size": 509, "rms_norm_eps": 1e-3},
    "head-96": {"hidden_size": 96, "num_attention_heads": 1, "num_key_value_heads": 1},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("olmo2", options, tmp_path, export_to_cache)
