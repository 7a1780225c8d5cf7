"""Llama 1 to 3.x and other models with `model_type: llama` (SmolLM2, TinyLlama and more)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Architecture, check_no_window, read_decoder_config, read_shape
from .decoder import DecoderConfig, TensorNames
from .fields import read_bool


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Llama config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config)
    check_no_window(config, shape)
    bias = read_bool(config, "attention_bias")
    return read_decoder_config(
        config, shape=shape, qkv_bias=bias, output_bias=bias, mlp_bias=read_bool(config, "mlp_bias")
    )


ARCHITECTURE: Final = Architecture("llama", read_config, TensorNames())
