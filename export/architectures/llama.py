"""Llama 1 to 3.x and everything that saves itself as `model_type: llama` (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edgelm.errors import CheckpointError

from ..decoder import Decoder, Names
from .fields import flag, positive_int, positive_number, read_rope, refuse_unless

NAMES: Final = Names(
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    final_norm="model.norm.weight",
    attention_norm="model.layers.{i}.input_layernorm.weight",
    query="model.layers.{i}.self_attn.q_proj.weight",
    key="model.layers.{i}.self_attn.k_proj.weight",
    value="model.layers.{i}.self_attn.v_proj.weight",
    output="model.layers.{i}.self_attn.o_proj.weight",
    mlp_norm="model.layers.{i}.post_attention_layernorm.weight",
    gate="model.layers.{i}.mlp.gate_proj.weight",
    up="model.layers.{i}.mlp.up_proj.weight",
    down="model.layers.{i}.mlp.down_proj.weight",
)


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Llama config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    refuse_unless(
        config,
        {
            "hidden_act": ("silu", "swish"),
            "sliding_window": (None,),
            "partial_rotary_factor": (None, 1, 1.0),
            "quantization_config": (None,),
        },
    )
    hidden = positive_int(config, "hidden_size")
    heads = positive_int(config, "num_attention_heads")
    kv_heads = positive_int(config, "num_key_value_heads", heads)
    if config.get("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    head_size = positive_int(config, "head_dim", hidden // heads)
    if head_size % 2:
        raise CheckpointError(f"config.json: head_dim must be even for rotary embedding, got {head_size}")
    context = positive_int(config, "max_position_embeddings", 2048)
    attention_bias = flag(config, "attention_bias")
    return Decoder(
        vocab_size=positive_int(config, "vocab_size"),
        hidden_size=hidden,
        layers=positive_int(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        mlp_size=positive_int(config, "intermediate_size"),
        context=context,
        norm_epsilon=positive_number(config, "rms_norm_eps", 1e-6),
        rope=read_rope(config, context),
        tied=flag(config, "tie_word_embeddings"),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=flag(config, "mlp_bias"),
    )
