"""SmolLM3: a Llama in which every fourth layer does without rotary embedding (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edgelm.errors import CheckpointError

from .common import Family, read_decoder, read_shape, rope_of, sliding_layers, windows
from .decoder import Decoder, Layer, Names
from .fields import flag, layer_list, positive_int

THETA: Final = 2_000_000.0


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a SmolLM3 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, kv_heads=4, context=32_768)
    rope = rope_of(config, shape, THETA)
    rotates = layer_list(config, "no_rope_layers", shape.layers, (0, 1))  # 1 means that it does rotate
    if rotates is None:
        interval = positive_int(config, "no_rope_layer_interval", 4)
        rotates = [int((i + 1) % interval != 0) for i in range(shape.layers)]
    slides = flag(config, "use_sliding_window") and config.get("sliding_window") is not None
    sliding = sliding_layers(config, shape.layers, [slides and not each for each in rotates])
    if any(sliding) and not slides:
        raise CheckpointError("config.json: layer_types has sliding_attention, but use_sliding_window is off")
    layers = [
        Layer(rope if each else None, window) for each, window in zip(rotates, windows(config, sliding), strict=True)
    ]
    bias = flag(config, "attention_bias")
    return read_decoder(
        config,
        shape=shape,
        layers=layers,
        tied=True,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=flag(config, "mlp_bias"),
    )


FAMILY: Final = Family("smollm3", decoder, Names())
