"""Granite 3 against transformers: multipliers on embeddings, branches, scores and logits."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 1.25,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.1,
}
CASES = {
    "multipliers": {**MULTIPLIERS},
    "no-multipliers": {},
    "biases-tied": {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "head-40-one-key-head": {
        **MULTIPLIERS,
        "hidden_size": 80,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 509,
    },
    "head-12": {**MULTIPLIERS, "hidden_size": 48},
    "linear": {**MULTIPLIERS, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "gelu": {**MULTIPLIERS, "hidden_act": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("granite", options, tmp_path, export_to_cache)
