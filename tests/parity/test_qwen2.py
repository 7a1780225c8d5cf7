"""Qwen 2 and 2.5 against transformers: biases, windows of later layers, YaRN."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

WINDOW = {"use_sliding_window": True, "sliding_window": 17}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "plain": {},
    "tied-one-key-head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "windows-of-later-layers": {**WINDOW, "max_window_layers": 2},
    "windows-everywhere": {**WINDOW, "max_window_layers": 0},
    "windows-nowhere": {**WINDOW, "max_window_layers": 99},
    "window-off": {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1},
    "layer-types": {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "head-12": {"hidden_size": 48},
    "head-8": {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 53},
    "head-128": {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 509},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn-head-12": {"rope_scaling": YARN, "hidden_size": 48},
    "yarn-window": {"rope_scaling": YARN, **WINDOW, "max_window_layers": 1, "rope_theta": 1e6},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(options, tmp_path, export_to_cache):
    families.check("qwen2", options, tmp_path, export_to_cache)
