"""Logits of exported Llamas against transformers, over shapes and options that real checkpoints have or may have."""

from __future__ import annotations

import families
import pytest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LLAMA3 = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64),
)
SHAPES = {
    "tied": {},
    "untied": {"tied": False},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True, "tied": False},
    "all-biases-odd-heads": {
        "attention_bias": True,
        "mlp_bias": True,
        "head_size": 24,
        "hidden": 66,
        "heads": 3,
        "kv_heads": 1,
    },
    "every-head-its-own-key": {"kv_heads": 4},
    "one-key-head": {"kv_heads": 1},
    "head-8": {"head_size": 8},
    "head-8-of-hidden": {"heads": 8, "kv_heads": 4},
    "head-24": {"head_size": 24},
    "head-40": {"head_size": 40, "hidden": 66, "heads": 6, "kv_heads": 3},
    "head-64": {"head_size": 64, "heads": 2, "kv_heads": 1},
    "head-2": {"head_size": 2},
    "hidden-40": {"hidden": 40, "heads": 5, "kv_heads": 5, "mlp": 52},
    "hidden-50-mlp-172": {"hidden": 50, "heads": 5, "kv_heads": 1, "mlp": 172},
    "one-layer": {"layers": 1},
    "odd-vocabulary": {"vocab": 509, "tied": False},
    "theta": {"theta": 500000.0},
    "small-theta": {"theta": 100.0, "head_size": 8},
    "linear": {"scaling": (("rope_type", "linear"), ("factor", 4.0))},
    "linear-old-name": {"scaling": (("type", "linear"), ("factor", 2.5)), "head_size": 8},
    "llama3": {"scaling": LLAMA3, "theta": 500000.0},
    "llama3-padded-heads": {"scaling": LLAMA3, "head_size": 40},
    "bfloat16": {"dtype": "bfloat16"},
    "float16-untied": {"dtype": "float16", "tied": False},
    "sharded": {"shards": 3, "dtype": "bfloat16"},
    "sharded-float32-untied": {"shards": 2, "tied": False},
}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES = {
    "head-96": {"head_dim": 96, "num_attention_heads": 2, "num_key_value_heads": 1},
    "head-128": {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1},
    "head-256": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu-new": {"hidden_act": "gelu_new"},
    "gelu-pytorch-tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn-of-one-factor": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn-few-turns-head-40": {"head_dim": 40, "rope_scaling": {**YARN, "beta_fast": 3, "beta_slow": 2.5}},
}


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_float32_logits_and_greedy_steps_match_transformers(fields, tiny_checkpoint, export_to_cache):
    checkpoint = tiny_checkpoint(**fields)
    families.compare(families.reference(checkpoint), export_to_cache(checkpoint, quant="fp32"))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_options_of_transformers(options, tmp_path, export_to_cache):
    families.check("llama", options, tmp_path, export_to_cache)


def test_a_prompt_in_chunks_equals_one_pass(tiny_checkpoint, export_to_cache):
    checkpoint = tiny_checkpoint(context=1024, scaling=LLAMA3, head_size=24)
    families.compare_chunks(families.reference(checkpoint), export_to_cache(checkpoint, quant="fp32"))


def test_answers_together_equal_answers_alone(tiny_checkpoint, export_to_cache):
    families.compare_batch(export_to_cache(tiny_checkpoint(head_size=24), quant="fp32"))
