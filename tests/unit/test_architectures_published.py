"""config.json as well-known checkpoints carry it is read: every key, in the spelling of transformers 4 and of 5.

Beside each stands the number of weights that its model card or its files state.
"""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.architectures import find_family

COMMON = {
    "architectures": ["AnyForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}


def entry(family, parameters, sizes, **keys):
    """Sizes: vocabulary, hidden, MLP, layers, heads, key heads, context."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    return {**COMMON, "model_type": family, **dict(zip(names, sizes, strict=True)), **keys}, parameters


LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
GEMMA = {"attention_bias": False, "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "rms_norm_eps": 1e-06}
GEMMA3 = {
    **GEMMA,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
}
QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-06, "use_sliding_window": False, "tie_word_embeddings": True}
PHI3 = {
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
}
MISTRAL = {"hidden_act": "silu", "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
PUBLISHED = {
    "Llama-3.2-1B": entry(
        "llama",
        1_235_814_400,
        (128256, 2048, 8192, 16, 32, 8, 131072),
        attention_bias=False,
        head_dim=64,
        hidden_act="silu",
        mlp_bias=False,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_scaling={**LLAMA3, "rope_type": "llama3"},
        rope_theta=500000.0,
        tie_word_embeddings=True,
    ),
    "SmolLM2-135M": entry(
        "llama",
        134_515_008,
        (49152, 576, 1536, 30, 9, 3, 8192),
        attention_bias=False,
        hidden_act="silu",
        is_llama_config=True,
        mlp_bias=False,
        pretraining_tp=1,
        rms_norm_eps=1e-05,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=100000,
        tie_word_embeddings=True,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "Mistral-7B-v0.1": entry(
        "mistral",
        7_241_732_096,
        (32000, 4096, 14336, 32, 32, 8, 32768),
        rope_theta=10000.0,
        sliding_window=4096,
        **MISTRAL,
    ),
    "Mistral-7B-v0.3": entry(
        "mistral",
        7_248_023_552,
        (32768, 4096, 14336, 32, 32, 8, 32768),
        rope_theta=1000000.0,
        sliding_window=None,
        **MISTRAL,
    ),
    "Ministral-8B-2410": entry(
        "mistral",
        8_019_808_256,
        (131072, 4096, 12288, 36, 32, 8, 32768),
        head_dim=128,
        rope_theta=100000000.0,
        sliding_window=32768,
        **MISTRAL,
    ),
    "Qwen2.5-0.5B": entry(
        "qwen2",
        494_032_768,
        (151936, 896, 4864, 24, 14, 2, 32768),
        max_window_layers=24,
        rope_theta=1000000.0,
        sliding_window=32768,
        use_mrope=False,
        **QWEN,
    ),
    "Qwen3-0.6B": entry(
        "qwen3",
        596_049_920,
        (151936, 1024, 3072, 28, 16, 8, 40960),
        attention_bias=False,
        head_dim=128,
        max_window_layers=28,
        rope_scaling=None,
        rope_theta=1000000,
        sliding_window=None,
        **QWEN,
    ),
    "SmolLM3-3B": entry(
        "smollm3",
        3_075_098_624,
        (128256, 2048, 11008, 36, 16, 4, 65536),
        attention_bias=False,
        hidden_act="silu",
        layer_types=["full_attention"] * 36,
        max_window_layers=28,
        mlp_bias=False,
        no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9,
        pretraining_tp=2,
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=5000000.0,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "gemma-2-2b": entry(
        "gemma2",
        2_614_341_888,
        (256000, 2304, 9216, 26, 8, 4, 8192),
        attn_logit_softcapping=50.0,
        cache_implementation="hybrid",
        final_logit_softcapping=30.0,
        head_dim=256,
        hidden_act="gelu_pytorch_tanh",
        query_pre_attn_scalar=256,
        rope_theta=10000.0,
        sliding_window=4096,
        **GEMMA,
    ),
    "gemma-3-1b-it": entry(
        "gemma3_text",
        999_885_952,
        (262144, 1152, 6912, 26, 4, 1, 32768),
        cache_implementation="hybrid",
        sliding_window_pattern=6,
        **GEMMA3,
    ),
    "gemma-3-270m": entry(
        "gemma3_text",
        268_098_176,
        (262144, 640, 2048, 18, 4, 1, 32768),
        _sliding_window_pattern=6,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
        use_bidirectional_attention=False,
        **GEMMA3,
    ),
    "Phi-3-mini-4k": entry(
        "phi3",
        3_821_079_552,
        (32064, 3072, 8192, 32, 32, 32, 4096),
        rope_scaling=None,
        sliding_window=2047,
        tie_word_embeddings=False,
        **PHI3,
    ),
    "Phi-3-mini-128k": entry(
        "phi3",
        3_821_079_552,
        (32064, 3072, 8192, 32, 32, 32, 131072),
        rope_scaling={"long_factor": [1.5] * 48, "short_factor": [1.1] * 48, "type": "longrope"},
        sliding_window=262144,
        tie_word_embeddings=False,
        **PHI3,
    ),
    "Phi-4-mini": entry(
        "phi3",
        3_836_021_760,
        (200064, 3072, 8192, 32, 24, 8, 131072),
        full_attn_mod=1,
        interpolate_factor=1,
        lm_head_bias=False,
        mlp_bias=False,
        partial_rotary_factor=0.75,
        rope_scaling={"long_factor": [1, 1.5] * 24, "short_factor": [1.0] * 48, "type": "longrope"},
        sliding_window=262144,
        tie_word_embeddings=True,
        **PHI3,
    ),
    "granite-3.3-2b": entry(
        "granite",
        2_533_539_840,
        (49159, 2048, 8192, 40, 32, 8, 131072),
        attention_bias=False,
        attention_multiplier=0.015625,
        embedding_multiplier=12.0,
        hidden_act="silu",
        logits_scaling=8.0,
        mlp_bias=False,
        residual_multiplier=0.22,
        rms_norm_eps=1e-05,
        rope_scaling=None,
        rope_theta=10000000.0,
        tie_word_embeddings=True,
    ),
    "OLMo-2-1B": entry(
        "olmo2",
        1_484_916_736,
        (100352, 2048, 8192, 16, 16, 16, 4096),
        attention_bias=False,
        hidden_act="silu",
        rms_norm_eps=1e-06,
        rope_scaling=None,
        rope_theta=500000,
        tie_word_embeddings=False,
    ),
}


def as_transformers_5_saves_it(config):
    """Rope options in rope_parameters, those of Gemma 3 by kind of layer; dtype for torch_dtype."""
    kept = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    kept["dtype"] = config["torch_dtype"]
    options = {"rope_theta": config["rope_theta"], "rope_type": "default", **(config.get("rope_scaling") or {})}
    if "type" in options:
        options["rope_type"] = options["type"]
    if config["model_type"] == "phi3":
        options["partial_rotary_factor"] = config.get("partial_rotary_factor", 1.0)
        if options["rope_type"] == "longrope":
            options["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if config["model_type"] == "gemma3_text":
        local = {"rope_theta": kept.pop("rope_local_base_freq"), "rope_type": "default"}
        options = {"full_attention": options, "sliding_attention": local}
    return {**kept, "rope_parameters": options}


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_configuration_is_read(config, parameters):
    family = find_family(config)
    decoder = family.decoder(config)
    assert decoder.parameters == parameters
    assert family.decoder(as_transformers_5_saves_it(config)) == decoder
