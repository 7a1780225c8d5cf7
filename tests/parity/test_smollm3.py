"""SmolLM3 against transformers: some layers have no rotary embedding."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CASES = {
    "every-fourth": {"num_hidden_layers": 5},
    "interval-2-untied": {"no_rope_layer_interval": 2, "tie_word_embeddings": False},
    "listed": {"no_rope_layers": [0, 1, 1]},
    "none-rotates": {"no_rope_layers": [0, 0, 0]},
    "all-rotate": {"no_rope_layers": [1, 1, 1]},
    "windows-where-none-rotates": {"use_sliding_window": True, "sliding_window": 20, "no_rope_layers": [1, 0, 1]},
    "layer-types": {
        "use_sliding_window": True,
        "sliding_window": 20,
        "no_rope_layers": [1, 0, 1],
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "biases-head-12": {"attention_bias": True, "mlp_bias": True, "hidden_size": 48, "no_rope_layer_interval": 2},
    "yarn-head-24": {
        "hidden_size": 72,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "no_rope_layer_interval": 3,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("smollm3", options, tmp_path, export_to_cache)
