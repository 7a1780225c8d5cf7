"""Mistral: a Llama whose layers may all see only a window of positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Family, read_decoder, read_shape, rope_of, windows
from .decoder import Decoder, Layer, Names
from .fields import FULL, refuse_unless

WINDOW: Final = 4096
"""Where config.json does not say; null there means none."""


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Mistral config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=8, context=131_072)
    rope = rope_of(config, shape)
    slides = config.get("sliding_window", WINDOW) is not None
    if slides or config.get("layer_types") != [FULL] * shape.layers:  # idle where it says what the missing window does
        refuse_unless(config, {"layer_types": (None,)})
    layers = [Layer(rope, window) for window in windows(config, [slides] * shape.layers, WINDOW)]
    return read_decoder(config, shape=shape, layers=layers)


FAMILY: Final = Family("mistral", decoder, Names())
