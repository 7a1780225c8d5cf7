"""Phi 3, 3.5 and 4: projections stored as one, part of each head rotates, LongRoPE (arXiv:2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Family, read_decoder, read_shape, windows
from .decoder import Decoder, Layer, Names
from .fields import MOST_POSITIONS, positive_int
from .positions import read_rope, rope_options

OLD_NAMES: Final = {"su": "longrope", "yarn": "longrope"}
"""What early checkpoints call LongRoPE."""

NAMES: Final = Names(
    qkv="model.layers.{i}.self_attn.qkv_proj.weight", gate_up="model.layers.{i}.mlp.gate_up_proj.weight"
)


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Phi 3 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, context=4096, partial=True)
    original = {
        "original_max_position_embeddings": positive_int(
            config, "original_max_position_embeddings", 4096, most=MOST_POSITIONS
        )
    }
    rope = read_rope(
        {**config, **original}, shape.context, shape.rotary_size, options=rope_options(config), aliases=OLD_NAMES
    )
    slides = config.get("sliding_window") is not None
    layers = [Layer(rope, window) for window in windows(config, [slides] * shape.layers)]
    return read_decoder(config, shape=shape, layers=layers, norm_epsilon=1e-5)


FAMILY: Final = Family("phi3", decoder, NAMES)
