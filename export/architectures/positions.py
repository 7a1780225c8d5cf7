"""Reads the rotary position options of a config.json: rope_scaling (transformers 4), rope_parameters (5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from edgelm.errors import CheckpointError

from .fields import MAX_POSITIONS, read_bool, read_optional_number, read_positive_int, read_positive_number
from .rope import ROPE_KINDS, RopeConfig, longrope_attention_factor, yarn_attention_factor

ROPE_OPTIONS: Final[dict[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset({"factor", "original_max_position_embeddings"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
}
"""Options of each kind that are read, or have no effect with it. Others are refused."""

COMMON: Final = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
)
"""Options allowed with every kind. Sections of multimodal rotation have no effect: text has one position in all."""

ALIASES: Final = {"mrope": "default"}
"""Other names of kinds. On text, rotation in sections equals the default (Qwen2-VL, arXiv:2409.12191)."""


def merge_rope_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of rope_scaling and rope_parameters, merged."""
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        options = config.get(name)
        if options is not None and not isinstance(options, dict):
            raise CheckpointError(f"config.json: {name} must be an object or null, got {options!r}")
        merged.update(options or {})
    return merged


def read_partial_rotary_factor(config: Mapping[str, Any], *, is_supported: bool) -> float:
    """Return the share of each head that rotates, in (0, 1]. Raises if it is below 1 and not `is_supported`."""
    share = read_positive_number({**config, **merge_rope_options(config)}, "partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and not is_supported):
        limit = "at most 1" if is_supported else "1 for this model_type"
        raise CheckpointError(f"config.json: partial_rotary_factor must be {limit}, got {share}")
    return share


def read_rope(
    config: Mapping[str, Any],
    context: int,
    size: int,
    *,
    theta: float = 10000.0,
    options: Mapping[str, Any] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> RopeConfig:
    """Read the rotary options. `size`: rotating elements of a head. `aliases`: an architecture's old names of kinds.

    Raises `CheckpointError` for a kind or an option that is not supported.
    """
    given = merge_rope_options(config) if options is None else dict(options)
    base = read_positive_number({**config, **given}, "rope_theta", theta)
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {**ALIASES, **(aliases or {})}.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_KINDS:
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    unknown = sorted(
        {name for name in given if given[name] is not None} - ROPE_OPTIONS[kind] - COMMON
    )  # null has no effect
    if kind == "default" and ("rope_type" in given or "type" in given):
        unknown = sorted(
            set(unknown).difference(*ROPE_OPTIONS.values())
        )  # options of other kinds have no effect with this one
    if unknown:
        raise CheckpointError(f"config.json: {unknown[0]} of rope_type {kind!r} is not supported")
    if kind in ("linear", "dynamic", "llama3", "yarn") and given.get("factor") is None:
        raise CheckpointError("config.json: rope_scaling has no factor")
    factor = read_positive_number(given, "factor", 1.0)
    original = read_positive_int(given, "original_max_position_embeddings", context, maximum=MAX_POSITIONS)
    if kind == "llama3":
        low = read_positive_number(given, "low_freq_factor", 1.0)
        high = read_positive_number(given, "high_freq_factor", 4.0)
        if high <= low:
            raise CheckpointError(f"config.json: high_freq_factor must exceed low_freq_factor {low}, got {high}")
        return RopeConfig(base, "llama3", factor, original, low, high)
    if kind == "yarn":
        scale = read_optional_number(given, "attention_factor")
        if scale is None:
            scale = yarn_attention_factor(
                factor, read_optional_number(given, "mscale"), read_optional_number(given, "mscale_all_dim")
            )
        return RopeConfig(
            base,
            "yarn",
            factor,
            original,
            beta_fast=read_positive_number(given, "beta_fast", 32.0),
            beta_slow=read_positive_number(given, "beta_slow", 1.0),
            truncate=read_bool(given, "truncate", True),
            attention_factor=scale,
        )
    if kind == "longrope":
        return _longrope(config, given, base, context, size)
    return RopeConfig(base) if kind == "default" else RopeConfig(base, kind, factor)


def _longrope(config: Mapping[str, Any], given: Mapping[str, Any], base: float, context: int, size: int) -> RopeConfig:
    merged = {**given, **{k: v for k, v in config.items() if k == "original_max_position_embeddings" and v is not None}}
    original = read_positive_int(merged, "original_max_position_embeddings", context, maximum=MAX_POSITIONS)
    factor = read_positive_number(given, "factor", context / original)
    scale = read_optional_number(given, "attention_factor")
    factors = {}
    for name in ("short_factor", "long_factor"):
        values = given.get(name)
        if not isinstance(values, list) or len(values) != size // 2:
            raise CheckpointError(f"config.json: {name} must have {size // 2} numbers, one for each rotating pair")
        if None in values:
            raise CheckpointError(f"config.json: {name} must have numbers only, got null")
        factors[name] = tuple(read_positive_number({name: value}, name, 1.0) for value in values)
    return RopeConfig(
        base,
        "longrope",
        factor,
        original,
        attention_factor=longrope_attention_factor(factor, original) if scale is None else scale,
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )
