"""Llama 1 to 3.x and everything that saves itself as `model_type: llama` (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from .common import Family, check_no_window, read_decoder, read_shape
from .decoder import Decoder, Names
from .fields import flag


def decoder(config: Mapping[str, Any]) -> Decoder:
    """Read a Llama config.json. Raises `CheckpointError` for a bad value or an unsupported option."""
    shape = read_shape(config)
    check_no_window(config, shape)
    bias = flag(config, "attention_bias")
    return read_decoder(config, shape=shape, qkv_bias=bias, output_bias=bias, mlp_bias=flag(config, "mlp_bias"))


FAMILY: Final = Family("llama", decoder, Names())
