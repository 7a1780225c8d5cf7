"""Qwen 3: queries and keys are normed per head before rotation; the head size is configured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Architecture, read_decoder_config, read_optional_windows, read_shape, read_shared_rope
from .decoder import DecoderConfig, LayerConfig, TensorNames
from .fields import read_bool


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen3 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=32, head_size=128, context=32_768)
    rope = read_shared_rope(config, shape)
    layers = [LayerConfig(rope, window) for window in read_optional_windows(config, shape, 28)]
    bias = read_bool(config, "attention_bias")
    return read_decoder_config(config, shape=shape, layers=layers, qkv_bias=bias, output_bias=bias, qk_norm="head")


ARCHITECTURE: Final = Architecture("qwen3", read_config, TensorNames())
