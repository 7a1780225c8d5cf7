"""Gemma 3, text only: Gemma 2 with query and key norms, and a rope of their own for local layers (arXiv:2503.19786)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edgelm.errors import CheckpointError

from .common import Family, Shape, read_shape, sliding_layers, windows
from .decoder import Decoder, Layer
from .fields import FULL, SLIDING, positive_int, positive_number, refuse_unless
from .gemma2 import NAMES, gemma
from .positions import partial_rotary_factor, read_rope, rope_options
from .rope import Rope

GLOBAL_THETA: Final = 1_000_000.0
LOCAL_THETA: Final = 10_000.0


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Gemma 3 text config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    # transformers reads a soft cap of the scores here but never applies it: what was trained is anyone's guess
    refuse_unless(config, {"attn_logit_softcapping": (None,)})
    shape = read_shape(config, kv_heads=4, head_size=256, context=131_072)
    pattern = positive_int(config, "sliding_window_pattern", 6)
    sliding = sliding_layers(config, shape.layers, [(i + 1) % pattern != 0 for i in range(shape.layers)])
    everywhere, local = _ropes(config, shape)
    layers = [Layer(everywhere if w is None else local, w) for w in windows(config, sliding, 4096)]
    return gemma(config, shape, layers, attention_softcap=None, logit_softcap=None, qk_norm="head")


def _ropes(config: Mapping[str, Any], shape: Shape) -> tuple[Rope, Rope]:
    """Return the ropes of global and local layers; transformers 5 has one object of options for each."""
    parameters, local_options = config.get("rope_parameters"), {}
    if isinstance(parameters, dict) and (FULL in parameters or SLIDING in parameters):
        unknown = sorted(set(parameters) - {FULL, SLIDING})
        if unknown:
            raise CheckpointError(f"config.json: rope_parameters has the unknown key {unknown[0]!r}")
        local_options = rope_options({"rope_parameters": parameters.get(SLIDING)})
        config = {**config, "rope_parameters": parameters.get(FULL)}
    options = rope_options(config)
    for each in (options, local_options):
        partial_rotary_factor(each, built=False)
    local = {"rope_theta": positive_number(config, "rope_local_base_freq", LOCAL_THETA)}
    return (
        read_rope(config, shape.context, shape.rotary_size, theta=GLOBAL_THETA, options=options),
        read_rope(local, shape.context, shape.rotary_size, options=local_options),
    )


FAMILY: Final = Family("gemma3_text", decoder, NAMES)
