"""Reads fields of a config.json: checks types, and refuses unsupported options instead of ignoring them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edgelm.errors import CheckpointError

from .decoder import Activation

ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of activations, and ours."""

FULL_ATTENTION, SLIDING_ATTENTION = "full_attention", "sliding_attention"


MAX_WIDTH: Final = 1 << 24
"""Maximum width of a hidden state, a vocabulary and similar sizes: 100 times those of published models."""
MAX_POSITIONS: Final = 1 << 40
"""Some configurations use such a number for "no limit"."""


def read_positive_int(
    config: Mapping[str, Any], name: str, default: int | None = None, *, maximum: int = MAX_WIDTH
) -> int:
    """Return an integer in [1, maximum] of the configuration; `default` if it is missing or null."""
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, got {config.get(name)!r:.80}")
    if value > maximum:
        raise CheckpointError(f"config.json: {name} must be at most {maximum}, got {value!r:.80}")
    return value


def read_positive_number(config: Mapping[str, Any], name: str, default: float) -> float:
    """Return a positive number of the configuration; `default` if it is missing or null."""
    value = read_optional_number(config, name)
    return default if value is None else value


def read_optional_number(config: Mapping[str, Any], name: str) -> float | None:
    """Return a positive number of the configuration; None if it is missing or null."""
    value = config.get(name)
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise CheckpointError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def read_bool(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Return a boolean of the configuration; `default` if it is missing or null."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, got {value!r}")
    return default if value is None else value


def read_activation(config: Mapping[str, Any], *names: str) -> Activation:
    """Return the activation in the first of the named fields that is present; SiLU if none is."""
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        return "silu"
    value = config[name]
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise CheckpointError(f"config.json: {name} = {value!r} is not supported (expected {_either(ACTIVATIONS)})")
    return ACTIVATIONS[value]


def check_supported(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise `CheckpointError` if an option is present with a value that is not supported."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            raise CheckpointError(
                f"config.json: {name} = {config[name]!r} is not supported (expected {_either(values)})"
            )


def read_layer_list(config: Mapping[str, Any], name: str, layers: int, allowed: tuple[Any, ...]) -> list[Any] | None:
    """Return a list with one value of `allowed` for each layer; None if it is missing or null."""
    values = config.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) < layers or any(value not in allowed for value in values):
        raise CheckpointError(
            f"config.json: {name} must have {layers} entries, each {_either(allowed)}; got {str(values)[:80]}"
        )
    return values[:layers]


def _either(values: Any) -> str:
    return " or ".join(repr(value) for value in values)
