"""Granite 3: a Llama with multipliers on embeddings, branches, attention scores and logits (arXiv:2407.13739)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Family, read_decoder
from .decoder import Decoder, Names
from .fields import flag, positive_number


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Granite config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    bias = flag(config, "attention_bias")
    return read_decoder(
        config,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=flag(config, "mlp_bias"),
        attention_scale=positive_number(config, "attention_multiplier", 1.0),
        embedding_scale=positive_number(config, "embedding_multiplier", 1.0),
        branch_scale=positive_number(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / positive_number(config, "logits_scaling", 1.0),
    )


FAMILY: Final = Family("granite", decoder, Names())
