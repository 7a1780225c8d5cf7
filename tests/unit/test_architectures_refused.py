"""Unsupported options are refused by name in every architecture; none that changes a result is ignored."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.architectures import find_architecture
from test_architectures import ALL, read

from edgelm.errors import CheckpointError

YARN, LINEAR = {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}
REFUSED = [
    *[(family, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config") for family in ALL],
    *[(family, {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "'spiral'") for family in ALL],
    *[(family, {"rope_scaling": {**LINEAR, "alpha": 8.0}}, "alpha") for family in ALL],
    *[(family, {"rope_scaling": [LINEAR]}, "rope_scaling") for family in ALL],
    *[(family, {"rope_theta": -1.0}, "rope_theta") for family in ALL],
    *[(family, {"rms_norm_eps": "1e-6"}, "rms_norm_eps") for family in ALL],
    *[(family, {"num_key_value_heads": 3}, "num_key_value_heads 3") for family in ALL],
    *[(family, {"head_dim": 5}, "head_dim") for family in ALL],
    *[(family, {"head_dim": 2.0}, "head_dim") for family in ALL],
    *[(family, {"tie_word_embeddings": "yes"}, "tie_word_embeddings") for family in ALL],
    *[(family, {"max_position_embeddings": 0}, "max_position_embeddings") for family in ALL],
    *[(family, {"num_hidden_layers": True}, "num_hidden_layers") for family in ALL],
    *[(family, {"hidden_act": "swiglu7"}, "hidden_act = 'swiglu7'") for family in ALL if "gemma" not in family],
    ("gemma2", {"hidden_activation": "swiglu7"}, "hidden_activation = 'swiglu7'"),
    ("llama", {"sliding_window": 20}, "sliding_window"),
    *[(family, {"partial_rotary_factor": 0.5}, "partial_rotary_factor") for family in ALL if family != "phi3"],
    *[
        (family, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor")
        for family in ALL
        if family != "phi3"
    ],
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor"),
    ("llama", {"rope_scaling": {**YARN, "attention_factor": "big"}}, "attention_factor"),
    ("llama", {"rope_scaling": {**YARN, "truncate": 1}}, "truncate"),
    ("llama", {"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "original_max_position_embeddings"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4, "high_freq_factor": 4}},
        "high_freq_factor",
    ),
    ("mistral", {"layer_types": ["sliding_attention"] * 8}, "layer_types"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("qwen2", {"max_window_layers": -1}, "max_window_layers"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 8}, "use_sliding_window"),
    *[
        (family, {"layer_types": ["full_attention"] * 7 + ["chunked_attention"]}, "layer_types")
        for family in ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")
    ],
    ("qwen2", {"layer_types": ["full_attention"] * 7}, "layer_types"),
    ("qwen2", {"layer_types": "full_attention"}, "layer_types"),
    ("smollm3", {"no_rope_layers": [1, 2] * 4}, "no_rope_layers"),
    ("smollm3", {"no_rope_layers": [1] * 7}, "no_rope_layers"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma2", {"attn_logit_softcapping": -50.0}, "attn_logit_softcapping"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {}, "chunked_attention": {}}}, "'chunked_attention'"),
    ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ("phi3", {"head_dim": 8, "partial_rotary_factor": 0.4}, "head_dim"),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 8}}, "long_factor"),
    (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 7, "long_factor": [1.0] * 8}},
        "short_factor",
    ),
    (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [-1.0] * 8}},
        "long_factor",
    ),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    *[(family, {"rope_scaling": {"rope_type": ["linear"]}}, "rope_type ['linear']") for family in ALL],
    ("llama", {"hidden_act": ["silu"]}, "hidden_act = ['silu']"),
    ("llama", {"hidden_act": {"name": "silu"}}, "hidden_act"),
    *[("llama", {"rope_scaling": {"rope_type": kind, "factor": None}}, "factor") for kind in ("linear", "yarn")],
    (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [None] * 8, "long_factor": [1.0] * 8}},
        "short_factor",
    ),
    *[(family, {"rope_scaling": {"rop_type": "linear", "factor": 2.0}}, "factor of rope_type") for family in ALL],
    *[(family, {"rope_scaling": {"rope_type": "default", "mscale_section": [1]}}, "mscale_section") for family in ALL],
    ("llama", {"sliding_window": 20, "use_sliding_window": True}, "sliding_window = 20"),
    ("llama", {"sliding_window": 20, "layer_types": ["full_attention"] * 7 + ["sliding_attention"]}, "sliding_window"),
    ("mistral", {"layer_types": ["full_attention"] * 8}, "layer_types"),
    ("qwen3", {"rope_parameters": {"full_attention": YARN}}, "full_attention of rope_type"),
    ("gemma3_text", {"rope_parameters": {"full_attention": [1]}}, "rope_parameters"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": 5}}, "rope_parameters"),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
    ("smollm3", {"layer_types": ["sliding_attention"] * 8, "sliding_window": 5}, "use_sliding_window"),
    ("granite", {"residual_multiplier": 0}, "residual_multiplier"),
    ("granite", {"logits_scaling": [8.0]}, "logits_scaling"),
]


@pytest.mark.parametrize(("family", "options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_an_unsupported_option_is_refused_by_name(family, options, message):
    read(family)  # without the option it is read
    with pytest.raises(CheckpointError) as raised:
        read(family, **options)
    assert str(raised.value).startswith("config.json: ")
    assert message in str(raised.value)


@pytest.mark.parametrize("family", ALL)
def test_options_of_other_kinds_have_no_effect_with_the_default_kind(family):
    assert read(family, rope_scaling={"rope_type": "default", "factor": 8.0}) == read(family)


@pytest.mark.parametrize("model_type", ["gpt2", "", None, 5, ["llama"], {"llama": 1}])
def test_the_error_for_an_unknown_architecture_lists_the_supported_ones(model_type):
    with pytest.raises(CheckpointError, match=r"gemma2, .*--via optimum") as raised:
        find_architecture({"model_type": model_type})
    assert repr(model_type) in str(raised.value)
    assert all(family in str(raised.value) for family in ALL)


def test_a_width_that_is_not_a_multiple_of_the_heads_is_refused():
    with pytest.raises(CheckpointError, match=r"hidden_size 66 .*num_attention_heads 4"):
        read("llama", hidden_size=66)
    assert read("llama", hidden_size=66, head_dim=16).head_size == 16
