"""Llama 1 to 3.x and everything that saves itself as `model_type: llama` (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..decoder import Decoder, Names
from .common import Family, read_decoder
from .fields import flag, refuse_unless


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Llama config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    refuse_unless(config, {"sliding_window": (None,)})
    bias = flag(config, "attention_bias")
    return read_decoder(config, qkv_bias=bias, output_bias=bias, mlp_bias=flag(config, "mlp_bias"))


FAMILY: Final = Family("llama", decoder, Names())
