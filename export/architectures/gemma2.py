"""Gemma 2: norms before and after each branch, soft caps, every other layer local (arXiv:2408.00118, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Family, Shape, read_decoder, read_shape, rope_of, sliding_layers, windows
from .decoder import Decoder, Layer, Names
from .fields import activation, flag, optional_number, positive_number, refuse_unless

NAMES: Final = Names(
    attention_post_norm="model.layers.{i}.post_attention_layernorm.weight",
    mlp_norm="model.layers.{i}.pre_feedforward_layernorm.weight",
    mlp_post_norm="model.layers.{i}.post_feedforward_layernorm.weight",
)


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Gemma 2 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=4, head_size=256, context=8192)
    rope = rope_of(config, shape)
    sliding = sliding_layers(config, shape.layers, [i % 2 == 0 for i in range(shape.layers)])
    layers = [Layer(rope, window) for window in windows(config, sliding, 4096)]
    return gemma(config, shape, layers, attention_softcap=50.0, logit_softcap=30.0)


def gemma(
    config: Mapping[str, Any],
    shape: Shape,
    layers: list[Layer],
    *,
    attention_softcap: float | None,
    logit_softcap: float | None,
    **options: Any,
) -> Decoder:
    """Read what Gemma 2 and 3 share; the soft caps are defaults, null in config.json means none."""
    refuse_unless(config, {"use_bidirectional_attention": (None, False)})
    caps = {"attn_logit_softcapping": attention_softcap, "final_logit_softcapping": logit_softcap, **config}
    bias = flag(config, "attention_bias")
    return read_decoder(
        config,
        shape=shape,
        layers=layers,
        tied=True,
        activation=activation({"hidden_activation": "gelu_pytorch_tanh", **config}, "hidden_activation", "hidden_act"),
        attention_scale=positive_number(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=optional_number(caps, "attn_logit_softcapping"),
        logit_softcap=optional_number(caps, "final_logit_softcapping"),
        post_norm=True,
        norm_offset=1.0,
        qkv_bias=bias,
        output_bias=bias,
        embedding_scale=shape.hidden**0.5,
        **options,
    )


FAMILY: Final = Family("gemma2", decoder, NAMES)
