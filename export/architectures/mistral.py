"""Mistral: a Llama whose layers may all have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Architecture, read_decoder_config, read_shape, read_shared_rope, read_windows
from .decoder import DecoderConfig, LayerConfig, TensorNames
from .fields import FULL_ATTENTION, check_supported

WINDOW: Final = 4096
"""Default of sliding_window; null means no window."""


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Mistral config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=8, context=131_072)
    rope = read_shared_rope(config, shape)
    slides = config.get("sliding_window", WINDOW) is not None
    if (
        slides or config.get("layer_types") != [FULL_ATTENTION] * shape.layers
    ):  # full_attention in every layer is the same as no window
        check_supported(config, {"layer_types": (None,)})
    layers = [LayerConfig(rope, window) for window in read_windows(config, [slides] * shape.layers, WINDOW)]
    return read_decoder_config(config, shape=shape, layers=layers)


ARCHITECTURE: Final = Architecture("mistral", read_config, TensorNames())
