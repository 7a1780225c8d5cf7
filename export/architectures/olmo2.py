"""OLMo 2: norms after branches, not before; norms of whole query and key projections (arXiv:2501.00656, 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Architecture, read_decoder_config
from .decoder import DecoderConfig, TensorNames
from .fields import read_bool

NAMES: Final = TensorNames(
    attention_norm="",
    attention_post_norm="model.layers.{i}.post_attention_layernorm.weight",
    mlp_norm="",
    mlp_post_norm="model.layers.{i}.post_feedforward_layernorm.weight",
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read an OLMo 2 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    bias = read_bool(config, "attention_bias")
    return read_decoder_config(
        config,
        norm_epsilon=1e-5,
        pre_norm=False,
        post_norm=True,
        qk_norm="projection",
        qkv_bias=bias,
        output_bias=bias,
    )


ARCHITECTURE: Final = Architecture("olmo2", read_config, NAMES)
