"""Gemma 3, text only: Gemma 2 with query and key norms, and another rope for sliding layers (arXiv:2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edgelm.errors import CheckpointError

from .common import Architecture, ModelShape, read_shape, read_sliding_layers, read_windows
from .decoder import DecoderConfig, LayerConfig
from .fields import FULL_ATTENTION, SLIDING_ATTENTION, check_supported, read_positive_int, read_positive_number
from .gemma2 import NAMES, read_gemma_config
from .positions import merge_rope_options, read_partial_rotary_factor, read_rope
from .rope import RopeConfig

GLOBAL_THETA: Final = 1_000_000.0
LOCAL_THETA: Final = 10_000.0


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read a Gemma 3 text config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    # transformers reads this soft cap but does not apply it, so it is unknown whether the model was trained with it
    check_supported(config, {"attn_logit_softcapping": (None,)})
    shape = read_shape(config, kv_heads=4, head_size=256, context=131_072)
    pattern = read_positive_int(config, "sliding_window_pattern", 6)
    sliding = read_sliding_layers(config, shape.layers, [(i + 1) % pattern != 0 for i in range(shape.layers)])
    everywhere, local = _ropes(config, shape)
    layers = [LayerConfig(everywhere if w is None else local, w) for w in read_windows(config, sliding, 4096)]
    return read_gemma_config(config, shape, layers, attention_softcap=None, logit_softcap=None, qk_norm="head")


def _ropes(config: Mapping[str, Any], shape: ModelShape) -> tuple[RopeConfig, RopeConfig]:
    """Return the ropes of full and sliding layers; transformers 5 has one object of options for each."""
    parameters, local_options = config.get("rope_parameters"), {}
    if isinstance(parameters, dict) and (FULL_ATTENTION in parameters or SLIDING_ATTENTION in parameters):
        unknown = sorted(set(parameters) - {FULL_ATTENTION, SLIDING_ATTENTION})
        if unknown:
            raise CheckpointError(f"config.json: rope_parameters has the unknown key {unknown[0]!r}")
        local_options = merge_rope_options({"rope_parameters": parameters.get(SLIDING_ATTENTION)})
        config = {**config, "rope_parameters": parameters.get(FULL_ATTENTION)}
    options = merge_rope_options(config)
    for each in (options, local_options):
        read_partial_rotary_factor(each, is_supported=False)
    local = {"rope_theta": read_positive_number(config, "rope_local_base_freq", LOCAL_THETA)}
    return (
        read_rope(config, shape.context, shape.rotary_size, theta=GLOBAL_THETA, options=options),
        read_rope(local, shape.context, shape.rotary_size, options=local_options),
    )


ARCHITECTURE: Final = Architecture("gemma3_text", read_config, NAMES)
