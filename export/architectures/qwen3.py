"""Qwen 3: each head's queries and keys are normed before they rotate; heads have a size of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Family, optional_windows, read_decoder, read_shape, rope_of
from .decoder import Decoder, Layer, Names
from .fields import flag


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Qwen3 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=32, head_size=128, context=32_768)
    rope = rope_of(config, shape)
    layers = [Layer(rope, window) for window in optional_windows(config, shape, 28)]
    bias = flag(config, "attention_bias")
    return read_decoder(config, shape=shape, layers=layers, qkv_bias=bias, output_bias=bias, qk_norm="head")


FAMILY: Final = Family("qwen3", decoder, Names())
