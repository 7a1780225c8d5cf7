"""OLMo 2: branches are normed after, not before; queries and keys as whole projections (arXiv:2501.00656, 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Family, read_decoder
from .decoder import Decoder, Names
from .fields import flag

NAMES: Final = Names(
    attention_norm="",
    attention_post_norm="model.layers.{i}.post_attention_layernorm.weight",
    mlp_norm="",
    mlp_post_norm="model.layers.{i}.post_feedforward_layernorm.weight",
)


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read an OLMo 2 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    bias = flag(config, "attention_bias")
    return read_decoder(
        config,
        norm_epsilon=1e-5,
        pre_norm=False,
        post_norm=True,
        qk_norm="projection",
        qkv_bias=bias,
        output_bias=bias,
    )


FAMILY: Final = Family("olmo2", decoder, NAMES)
