"""Qwen 1.5, 2 and 2.5: biases on queries, keys and values; later layers may see only a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Family, optional_windows, read_decoder, read_shape, rope_of
from .decoder import Decoder, Layer, Names


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Qwen2 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=32, context=32_768)
    rope = rope_of(config, shape)
    layers = [Layer(rope, window) for window in optional_windows(config, shape, 28)]
    return read_decoder(config, shape=shape, layers=layers, qkv_bias=True)


FAMILY: Final = Family("qwen2", decoder, Names())
