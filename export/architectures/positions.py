"""Reading how a config.json stretches rotary positions: rope_scaling (transformers 4) or rope_parameters (5)."""

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
"""Options that each kind reads, or that are idle beside it; another one is refused."""

COMMON: Final = frozenset(
    {"rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved"}
)
"""What stands beside any kind. Sections of multimodal rotation are idle: a text's positions are the same in each."""

ALIASES: Final = {"mrope": "default"}
"""Kinds under another name: on text, rotation in sections is the plain one (Qwen2-VL, arXiv:2409.12191)."""


def merge_rope_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of rope_scaling and rope_parameters as one."""
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        options = config.get(name)
        if options is not None and not isinstance(options, dict):
            raise CheckpointError(f"config.json: {name} must be an object or null, got {options!r}")
        merged.update(options or {})
    return merged


def read_partial_rotary_factor(config: Mapping[str, Any], *, built: bool) -> float:
    """Return the share of each head that rotates, in (0, 1]; 1 where a family has no other `built`."""
    share = read_positive_number({**config, **merge_rope_options(config)}, "partial_rotary_factor", 1.0)
    if share > 1 or (share < 1 and not built):
        limit = "at most 1" if built else "1 in this family"
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
    """Read how positions rotate; `size` is how much of a head does, `aliases` are a family's old names of kinds.

    Raises `CheckpointError` for a kind or an option that is not built.
    """
    given = merge_rope_options(config) if options is None else dict(options)
    base = read_positive_number({**config, **given}, "rope_theta", theta)
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {**ALIASES, **(aliases or {})}.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ROPE_KINDS:
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    unknown = sorted({name for name in given if given[name] is not None} - ROPE_OPTIONS[kind] - COMMON)  # null is idle
    if kind == "default" and ("rope_type" in given or "type" in given):
        unknown = sorted(
            set(unknown).difference(*ROPE_OPTIONS.values())
        )  # what other kinds read is idle beside this one
    if unknown:
        raise CheckpointError(f"config.json: {unknown[0]} of rope_type {kind!r} is not supported")
    if kind in ("linear", "dynamic", "llama3", "yarn") and given.get("factor") is None:
        raise CheckpointError("config.json: rope_scaling has no factor")
    factor = read_positive_number(given, "factor", 1.0)
    original = read_positive_int(given, "original_max_position_embeddings", context, most=MAX_POSITIONS)
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
    original = read_positive_int(merged, "original_max_position_embeddings", context, most=MAX_POSITIONS)
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
