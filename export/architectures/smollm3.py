"""SmolLM3: a Llama with no rotary embedding in every fourth layer (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edgelm.errors import CheckpointError

from .common import Architecture, read_decoder_config, read_shape, read_shared_rope, read_sliding_layers, read_windows
from .decoder import DecoderConfig, LayerConfig, TensorNames
from .fields import read_bool, read_layer_list, read_positive_int

THETA: Final = 2_000_000.0


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a SmolLM3 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=4, context=32_768)
    rope = read_shared_rope(config, shape, THETA)
    rotates = read_layer_list(config, "no_rope_layers", shape.layers, (0, 1))  # 1: the layer rotates
    if rotates is None:
        interval = read_positive_int(config, "no_rope_layer_interval", 4)
        rotates = [int((i + 1) % interval != 0) for i in range(shape.layers)]
    slides = read_bool(config, "use_sliding_window") and config.get("sliding_window") is not None
    sliding = read_sliding_layers(config, shape.layers, [slides and not each for each in rotates])
    if any(sliding) and not slides:
        raise CheckpointError("config.json: layer_types has sliding_attention, but use_sliding_window is off")
    layers = [
        LayerConfig(rope if each else None, window)
        for each, window in zip(rotates, read_windows(config, sliding), strict=True)
    ]
    bias = read_bool(config, "attention_bias")
    return read_decoder_config(
        config,
        shape=shape,
        layers=layers,
        has_tied_head=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=read_bool(config, "mlp_bias"),
    )


ARCHITECTURE: Final = Architecture("smollm3", read_config, TensorNames())
