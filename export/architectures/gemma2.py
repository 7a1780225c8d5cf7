"""Gemma 2: norms before and after each branch, soft caps, every second layer sliding (arXiv:2408.00118, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import (
    Architecture,
    ModelShape,
    read_decoder_config,
    read_shape,
    read_shared_rope,
    read_sliding_layers,
    read_windows,
)
from .decoder import DecoderConfig, LayerConfig, TensorNames
from .fields import check_supported, read_activation, read_bool, read_optional_number, read_positive_number

NAMES: Final = TensorNames(
    attention_post_norm="model.layers.{i}.post_attention_layernorm.weight",
    mlp_norm="model.layers.{i}.pre_feedforward_layernorm.weight",
    mlp_post_norm="model.layers.{i}.post_feedforward_layernorm.weight",
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Gemma 2 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=4, head_size=256, context=8192)
    rope = read_shared_rope(config, shape)
    sliding = read_sliding_layers(config, shape.layers, [i % 2 == 0 for i in range(shape.layers)])
    layers = [LayerConfig(rope, window) for window in read_windows(config, sliding, 4096)]
    return read_gemma_config(config, shape, layers, attention_softcap=50.0, logit_softcap=30.0)


def read_gemma_config(
    config: Mapping[str, Any],
    shape: ModelShape,
    layers: list[LayerConfig],
    *,
    attention_softcap: float | None,
    logit_softcap: float | None,
    **options: Any,
) -> DecoderConfig:
    """Read the options that Gemma 2 and 3 share. Soft caps are defaults; null in config.json means none."""
    check_supported(config, {"use_bidirectional_attention": (None, False)})
    caps = {"attn_logit_softcapping": attention_softcap, "final_logit_softcapping": logit_softcap, **config}
    bias = read_bool(config, "attention_bias")
    return read_decoder_config(
        config,
        shape=shape,
        layers=layers,
        has_tied_head=True,
        activation=read_activation(
            {"hidden_activation": "gelu_pytorch_tanh", **config}, "hidden_activation", "hidden_act"
        ),
        attention_scale=read_positive_number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=read_optional_number(caps, "attn_logit_softcapping"),
        logit_softcap=read_optional_number(caps, "final_logit_softcapping"),
        post_norm=True,
        norm_offset=1.0,
        qkv_bias=bias,
        output_bias=bias,
        embedding_scale=shape.hidden**0.5,
        **options,
    )


ARCHITECTURE: Final = Architecture("gemma2", read_config, NAMES)
