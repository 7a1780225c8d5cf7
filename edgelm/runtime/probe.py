"""Checks on a few tokens that a graph for our kernels computes what the bundle's own graph computes.

Both graphs quantize activations to 8 bits, and one bit that is rounded differently in an early layer changes all later
layers, by an amount that depends on the model. So the two are not compared with each other, but both with the same
graph without that quantization: our kernels are correct if they are about as close to it as onnxruntime's. Measured on
a model of 135M (int4 and int8, blocks of 16 to 128): 0.77 to 1.19 times onnxruntime's divergence, which is 0.007 to
0.08 nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.manifest import Manifest
from edgelm.errors import EdgelmError
from edgelm.runtime.divergence import kl_divergences
from edgelm.runtime.ort import Graph

TOKENS: Final = 16
"""Number of positions that are compared."""

PASS_SIZES: Final = (1, 2, 5, 1, 7)
"""Tokens of the passes that compute the same positions in several passes."""

MAX_DIVERGENCE_RATIO: Final = 3.0
"""Maximum of our divergence from exact activations, divided by onnxruntime's."""

DIVERGENCE_TOLERANCE: Final = 0.01
"""Divergence that is always allowed, in nats: near 0 the ratio says nothing."""

_STRIDE: Final = 7919
"""Difference between successive token ids of the probe, modulo the vocabulary; a prime, so that the ids differ."""

_DTYPES: Final[dict[str, type[np.generic]]] = {"tensor(float)": np.float32, "tensor(int8)": np.int8}

Logits = NDArray[np.float32]


def compute_probe_logits(graph: Graph, manifest: Manifest, pass_sizes: Sequence[int] = (TOKENS,)) -> Logits:
    """Return the logits of the probe's tokens, float32 [n, V], computed in passes of the given numbers of tokens."""
    count = min(sum(pass_sizes), manifest.context)
    tokens = np.arange(1, count + 1, dtype=np.int64) * _STRIDE % manifest.vocab_size
    inputs = {value.name: value for value in graph.get_inputs()}
    kv_cache: dict[str, NDArray[Any]] = {
        name: np.zeros((1, value.shape[1], count, value.shape[3]), _DTYPES[value.type])
        for name, value in inputs.items()
        if name.startswith("past.")
    }
    presents = [name.replace("past.", "present.") for name in kv_cache]
    logits: list[Logits] = []
    start = 0
    for size in pass_sizes:
        end = min(start + size, count)
        if end == start:
            break
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": tokens[None, start:end],
            "seqlens_k": np.array([end - 1], np.int32),
            "total_sequence_length": np.array([end], np.int32),
            "rows": np.arange(end - start, dtype=np.int64),
        }
        if "positions" in inputs:
            feeds["positions"] = np.arange(start, end, dtype=np.int64)[None]
        found, *present = graph.run(["logits", *presents], {**feeds, **kv_cache})
        kv_cache = dict(zip(kv_cache, present, strict=True))
        logits.append(found)
        start = end
    return np.concatenate(logits)


def check_divergence(found: Logits, expected: Logits, exact: Logits) -> tuple[float, float]:
    """Return the mean divergences of our and of onnxruntime's logits from those of exact activations, in nats.

    `found` are the logits of our kernels, `expected` those of onnxruntime's, `exact` those of unquantized activations,
    float32 [n, V] each. Raises `EdgelmError` if ours diverge more than quantization explains.
    """
    if not (np.isfinite(expected).all() and np.isfinite(exact).all()):
        raise EdgelmError("the logits of onnxruntime's kernels are not finite, so ours cannot be compared with them")
    ours, theirs = (float(kl_divergences(exact, logits).mean()) for logits in (found, expected))
    if not ours <= MAX_DIVERGENCE_RATIO * theirs + DIVERGENCE_TOLERANCE:
        raise EdgelmError(
            f"the kernels compute other logits: they diverge by {ours:.3g} nats, those of onnxruntime by {theirs:.3g}"
        )
    return ours, theirs
