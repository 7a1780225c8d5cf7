"""Phi 3, 3.5 and 4: projections stored as one, part of each head rotates, LongRoPE (arXiv:2404.14219)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Architecture, read_decoder_config, read_shape, read_windows
from .decoder import DecoderConfig, LayerConfig, TensorNames
from .fields import MAX_POSITIONS, read_positive_int
from .positions import merge_rope_options, read_rope

LEGACY_ROPE_KINDS: Final = {"su": "longrope", "yarn": "longrope"}
"""Names of LongRoPE in early checkpoints."""

NAMES: Final = TensorNames(
    qkv="model.layers.{i}.self_attn.qkv_proj.weight", gate_up="model.layers.{i}.mlp.gate_up_proj.weight"
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Phi 3 config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config, context=4096, partial=True)
    original = {
        "original_max_position_embeddings": read_positive_int(
            config, "original_max_position_embeddings", 4096, maximum=MAX_POSITIONS
        )
    }
    rope = read_rope(
        {**config, **original},
        shape.context,
        shape.rotary_size,
        options=merge_rope_options(config),
        aliases=LEGACY_ROPE_KINDS,
    )
    slides = config.get("sliding_window") is not None
    layers = [LayerConfig(rope, window) for window in read_windows(config, [slides] * shape.layers)]
    return read_decoder_config(config, shape=shape, layers=layers, norm_epsilon=1e-5)


ARCHITECTURE: Final = Architecture("phi3", read_config, NAMES)
