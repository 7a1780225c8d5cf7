"""Reading a config.json with care: types checked, unsupported options named and refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelm.errors import CheckpointError

from ..decoder import Rope


def positive_int(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return a positive integer of the configuration; a missing or null one is `default`."""
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name} must be a positive integer, got {config.get(name)!r}")
    return value


def positive_number(config: Mapping[str, Any], name: str, default: float) -> float:
    """Return a positive number of the configuration; a missing or null one is `default`."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise CheckpointError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def flag(config: Mapping[str, Any], name: str) -> bool:
    """Return a switch of the configuration; a missing or null one is off."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, got {value!r}")
    return bool(value)


def refuse_unless(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise `CheckpointError` for an option that is present with a value we do not build."""
    for name, values in allowed.items():
        if name in config and config[name] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise CheckpointError(f"config.json: {name} = {config[name]!r} is not supported (expected {expected})")


def read_rope(config: Mapping[str, Any], context: int) -> Rope:
    """Read rope_theta and rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config.json: {name} must be an object or null, got {value!r}")
    options = {**(old or {}), **(new or {})}
    refuse_unless(options, {"partial_rotary_factor": (None, 1, 1.0)})
    theta = positive_number({**config, **options}, "rope_theta", 10000.0)
    kind = options.get("rope_type") or options.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", _factor(options))
    if kind == "llama3":
        return Rope(
            theta,
            "llama3",
            _factor(options),
            positive_number(options, "low_freq_factor", 1.0),
            positive_number(options, "high_freq_factor", 4.0),
            positive_int(options, "original_max_position_embeddings", context),
        )
    raise CheckpointError(f"config.json: rope_type {kind!r} is not supported; supported: default, linear, llama3")


def _factor(options: Mapping[str, Any]) -> float:
    if "factor" not in options:
        raise CheckpointError("config.json: rope_scaling has no factor")
    return positive_number(options, "factor", 1.0)
