"""Mistral: a Llama whose layers may all see only a window of positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Architecture, read_decoder_config, read_shape, read_shared_rope, read_windows
from .decoder import DecoderConfig, LayerConfig, TensorNames
from .fields import FULL_ATTENTION, check_supported

WINDOW: Final = 4096
"""Where config.json does not say; null there means none."""


def decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Mistral config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=8, context=131_072)
    rope = read_shared_rope(config, shape)
    slides = config.get("sliding_window", WINDOW) is not None
    if (
        slides or config.get("layer_types") != [FULL_ATTENTION] * shape.layers
    ):  # idle where it says what the missing window does
        check_supported(config, {"layer_types": (None,)})
    layers = [LayerConfig(rope, window) for window in read_windows(config, [slides] * shape.layers, WINDOW)]
    return read_decoder_config(config, shape=shape, layers=layers)


ARCHITECTURE: Final = Architecture("mistral", decoder, TensorNames())
