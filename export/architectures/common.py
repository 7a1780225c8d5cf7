"""Reads the options that architectures share; each architecture adds its own on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from edgelm.bundle.manifest import MAX_HEAD_SIZE, MAX_HEADS, MAX_LAYERS
from edgelm.errors import CheckpointError

from .decoder import DecoderConfig, LayerConfig, TensorNames
from .fields import (
    FULL_ATTENTION,
    MAX_POSITIONS,
    SLIDING_ATTENTION,
    read_activation,
    read_bool,
    read_layer_list,
    read_positive_int,
    read_positive_number,
)
from .positions import read_partial_rotary_factor, read_rope
from .rope import RopeConfig


class Architecture(NamedTuple):
    """One architecture: its `model_type`, the reader of its config.json, and its checkpoints' tensor names."""

    model_type: str
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    tensor_names: TensorNames


class ModelShape(NamedTuple):
    """Sizes in a config.json. `context` is the checkpoint's own limit."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    rotary_size: int
    context: int


def read_shape(
    config: Mapping[str, Any],
    *,
    kv_heads: int | None = None,
    head_size: int | None = None,
    context: int = 2048,
    partial: bool = False,
) -> ModelShape:
    """Read the sizes. kv_heads, head_size, context: the architecture's defaults. partial: heads may rotate in part.

    Raises `CheckpointError`.
    """
    hidden = read_positive_int(config, "hidden_size")
    heads = read_positive_int(config, "num_attention_heads", maximum=MAX_HEADS)
    if "num_key_value_heads" in config:
        kv_heads = None  # null means one for each head
    groups = read_positive_int(
        config, "num_key_value_heads", heads if kv_heads is None else kv_heads, maximum=MAX_HEADS
    )
    if "head_dim" in config and config["head_dim"] is None:
        head_size = None
    if config.get("head_dim") is None and head_size is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    if heads % groups:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
        )
    size = read_positive_int(
        config, "head_dim", hidden // heads if head_size is None else head_size, maximum=MAX_HEAD_SIZE
    )
    rotary = int(size * read_partial_rotary_factor(config, is_supported=partial))
    if rotary % 2 or not rotary:
        raise CheckpointError(
            f"config.json: head_dim must be even for rotary embedding, got {rotary} rotating elements"
        )
    length = read_positive_int(config, "max_position_embeddings", context, maximum=MAX_POSITIONS)
    layers = read_positive_int(config, "num_hidden_layers", maximum=MAX_LAYERS)
    return ModelShape(hidden, layers, heads, groups, size, rotary, length)


def read_decoder_config(
    config: Mapping[str, Any],
    *,
    shape: ModelShape | None = None,
    layers: Sequence[LayerConfig] | None = None,
    theta: float = 10000.0,
    norm_epsilon: float = 1e-6,
    has_tied_head: bool = False,
    attention_scale: float | None = None,
    **options: Any,
) -> DecoderConfig:
    """Read a config.json into a decoder.

    layers: if None, all layers have the configured rope and no window. theta, norm_epsilon, has_tied_head: the
    architecture's defaults. options: other fields of `DecoderConfig`. Raises `CheckpointError` for a bad value or an
    unsupported option.
    """
    if config.get("quantization_config") is not None:  # opening a quantized checkpoint removes it
        raise CheckpointError("config.json: quantization_config is not supported with float weights")
    shape = read_shape(config) if shape is None else shape
    if layers is None:
        layers = [LayerConfig(read_shared_rope(config, shape, theta))] * shape.layers
    return DecoderConfig(
        vocab_size=read_positive_int(config, "vocab_size"),
        hidden_size=shape.hidden,
        layers=tuple(layers),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        mlp_size=read_positive_int(config, "intermediate_size"),
        context=shape.context,
        norm_epsilon=read_positive_number(config, "rms_norm_eps", norm_epsilon),
        has_tied_head=read_bool(config, "tie_word_embeddings", has_tied_head),
        attention_scale=shape.head_size**-0.5 if attention_scale is None else attention_scale,
        rotary_size=shape.rotary_size,
        **{"activation": read_activation(config, "hidden_act"), **options},
    )


def read_shared_rope(config: Mapping[str, Any], shape: ModelShape, theta: float = 10000.0) -> RopeConfig:
    """Read the rope that all layers share."""
    return read_rope(config, shape.context, shape.rotary_size, theta=theta)


def read_sliding_layers(config: Mapping[str, Any], layers: int, default: Sequence[bool]) -> list[bool]:
    """Return which layers are sliding: by `layer_types`, otherwise `default`."""
    kinds = read_layer_list(config, "layer_types", layers, (FULL_ATTENTION, SLIDING_ATTENTION))
    return list(default) if kinds is None else [kind == SLIDING_ATTENTION for kind in kinds]


def read_windows(config: Mapping[str, Any], sliding: Sequence[bool], default: int | None = None) -> list[int | None]:
    """Return the window of each layer, `sliding_window` positions; None for full attention.

    Raises `CheckpointError` if layers are sliding and there is no `sliding_window`.
    """
    if not any(sliding):
        return [None] * len(sliding)
    if config.get("sliding_window", default) is None:
        raise CheckpointError("config.json: layer_types has sliding_attention, but sliding_window is not set")
    window = read_positive_int(config, "sliding_window", default, maximum=MAX_POSITIONS)
    return [window if slides else None for slides in sliding]


def check_no_window(config: Mapping[str, Any], shape: ModelShape) -> None:
    """Raise `CheckpointError` for a `sliding_window` in an architecture without windows, unless it has no effect.

    It has no effect if it is null, 0 or at least the context, disabled by use_sliding_window, or used by no layer of
    layer_types.
    """
    window = config.get("sliding_window")
    if window is None or window == 0 or not read_bool(config, "use_sliding_window", True):
        return
    kinds = read_layer_list(config, "layer_types", shape.layers, (FULL_ATTENTION, SLIDING_ATTENTION))
    if kinds is not None and SLIDING_ATTENTION not in kinds:
        return
    if read_positive_int(config, "sliding_window", maximum=MAX_POSITIONS) < shape.context:
        raise CheckpointError(
            f"config.json: sliding_window = {window} is not supported for this model_type: expected null, or at least"
            f" max_position_embeddings {shape.context}"
        )


def read_optional_windows(config: Mapping[str, Any], shape: ModelShape, max_window_layers: int) -> list[int | None]:
    """Return the windows of architectures whose layers slide only with `use_sliding_window`, from a layer on (Qwen)."""
    slides = read_bool(config, "use_sliding_window") and config.get("sliding_window", 4096) is not None
    first = config.get("max_window_layers")
    first = max_window_layers if first is None else first
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise CheckpointError(f"config.json: max_window_layers must be an integer of at least 0, got {first!r}")
    sliding = read_sliding_layers(config, shape.layers, [slides and i >= first for i in range(shape.layers)])
    if any(sliding) and not slides:
        raise CheckpointError("config.json: layer_types has sliding_attention, but use_sliding_window is off")
    return read_windows(config, sliding, 4096)
