"""Measures the ranges of a model's keys and values, channel by channel: the scales of an int8 KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.bundle_folder import Bundle
from edgelm.runtime.kv_cache import KvSegment
from edgelm.runtime.runner import open_runner

from ..architectures.rope import RopeConfig
from ..calibration.text_samples import Document
from ..progress_callback import ProgressCallback
from ..self_generated import generate_documents
from ..source_model import SourceModel
from .int8_cache_graph import CacheScales

READ_TOKENS: Final = 16384
"""Approximate number of calibration tokens to measure on."""

MAX_CODE: Final = 127

MIN_SCALE_SHARE: Final = 1e-3
"""Least scale of a channel, as a share of its layer's largest; channels of padding get this scale."""

Array = NDArray[np.float32]


def measure_cache_scales(
    bundle: Bundle, model: SourceModel, documents: Sequence[Document] | None, progress: ProgressCallback
) -> list[CacheScales]:
    """Return the scales of each layer: the largest value of a channel gets the largest code.

    `bundle` has a float32 KV cache. It reads the documents, or 8,192 self-generated tokens if there are none. Keys are
    cached rotated; their range is taken over all positions of the context, see `max_over_positions`.
    """
    d = model.decoder
    shape = 2 * len(d.layers), d.kv_heads, d.padded_head_size
    largest = np.zeros(shape, np.float32)
    for piece in _read_caches(bundle, model, documents, progress):
        for i, array in enumerate(piece):
            rope = d.layers[i // 2].rope if i % 2 == 0 else None
            size = (
                np.abs(array)
                if rope is None
                else max_over_positions(array, rope, bundle.manifest.context, d.rotary_size)
            )
            np.maximum(largest[i], size.max(axis=1), out=largest[i])
    tops = largest.max(axis=(1, 2), keepdims=True)
    scales = np.maximum(largest, np.where(tops > 0, MIN_SCALE_SHARE * tops, 1)) / np.float32(MAX_CODE)
    return [CacheScales(key, value) for key, value in zip(scales[::2], scales[1::2], strict=True)]


def _read_caches(
    bundle: Bundle, model: SourceModel, documents: Sequence[Document] | None, progress: ProgressCallback
) -> Iterator[KvSegment]:
    """Yield the keys and values of all layers, float32 [kv_heads, n, head_size] each, for one document at a time."""
    if documents is None:
        runner, written = generate_documents(bundle, model)
        for row, document in enumerate(written):
            yield runner.read_row(row, 0, len(document))
        return
    chosen = documents[:: max(1, sum(map(len, documents)) // READ_TOKENS)]
    runner = open_runner(bundle, rows=1, context=max(map(len, chosen)))
    for number, document in enumerate(chosen):
        progress("ranges of keys and values: document", number + 1, len(chosen))
        runner.prefill(0, document, 0)
        yield runner.read_row(0, 0, len(document))


def max_over_positions(keys: Array, rope: RopeConfig, context: int, rotary_size: int) -> Array:
    """Return the largest magnitude that each channel has at any position of the context.

    keys: float32 [kv_heads, n, head_size], rotated to positions 0 .. n - 1, not changed; the result has the same shape.
    Two channels that rotate together move on a circle, slow ones on an arc of it. A scale for the whole circle would be
    coarser for one of the two (stories260K: KL .0040 instead of .0012). LongRoPE, whose keys rotate at one of two
    speeds, gets the whole circle.
    """
    size, half = np.abs(keys), rotary_size // 2
    first, second = keys[..., :half].astype(np.float64), keys[..., half : 2 * half].astype(np.float64)
    radius = np.hypot(first, second)
    if rope.long_from(context) is not None:
        size[..., :half] = size[..., half : 2 * half] = radius
        return size
    cosines, sines = rope.tables(2, rotary_size)
    step = np.arctan2(sines[1], cosines[1]).astype(np.float64)  # radians per position, [half]
    start = np.arctan2(second, first) - np.arange(keys.shape[1])[:, None] * step
    size[..., :half] = radius * _max_abs_cosine(start, (context - 1) * step)
    size[..., half : 2 * half] = radius * _max_abs_cosine(start - np.pi / 2, (context - 1) * step)
    return size


def _max_abs_cosine(start: NDArray[np.float64], arc: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest |cos| on the arcs [start, start + arc]: 1 if one contains a multiple of pi."""
    passes = np.floor(start / np.pi) < np.floor((start + arc) / np.pi)
    return np.where(passes, 1.0, np.maximum(np.abs(np.cos(start)), np.abs(np.cos(start + arc))))
