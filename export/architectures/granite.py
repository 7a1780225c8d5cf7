"""Granite 3: a Llama with multipliers on embeddings, branches, attention scores and logits (arXiv:2407.13739)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Architecture, read_decoder_config
from .decoder import DecoderConfig, TensorNames
from .fields import read_bool, read_positive_number


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Granite config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    bias = read_bool(config, "attention_bias")
    return read_decoder_config(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=read_bool(config, "mlp_bias"),
        attention_scale=read_positive_number(config, "attention_multiplier", 1.0),
        embedding_scale=read_positive_number(config, "embedding_multiplier", 1.0),
        residual_scale=read_positive_number(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / read_positive_number(config, "logits_scaling", 1.0),
    )


ARCHITECTURE: Final = Architecture("granite", read_config, TensorNames())
