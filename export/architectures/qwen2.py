"""Qwen 1.5, 2 and 2.5: biases on queries, keys and values; later layers may have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Architecture, read_decoder_config, read_optional_windows, read_shape, read_shared_rope
from .decoder import DecoderConfig, LayerConfig, TensorNames


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Qwen2 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=32, context=32_768)
    rope = read_shared_rope(config, shape)
    layers = [LayerConfig(rope, window) for window in read_optional_windows(config, shape, 28)]
    return read_decoder_config(config, shape=shape, layers=layers, qkv_bias=True)


ARCHITECTURE: Final = Architecture("qwen2", read_config, TensorNames())
