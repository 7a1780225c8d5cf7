"""Whether a graph for our kernels computes what the bundle's own graph does, on a few tokens.

Both round activations to 8 bits, and a last bit that falls otherwise early on moves what follows: how far, depends on
the model. So neither is compared with the other but both with the same graph without that rounding: kernels are right
that are about as near to it as onnxruntime's. Measured on a model of 135M (int4 and int8, blocks of 16 to 128): 0.77 to
1.19 times onnxruntime's divergence, which is 0.007 to 0.08 nats.
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
"""Positions that are compared."""

PASS_SIZES: Final = (1, 2, 5, 1, 7)
"""Sizes of passes that compute the same positions."""

FACTOR: Final = 3.0
"""Most by which our divergence from exact activations may exceed onnxruntime's."""

DIVERGENCE_TOLERANCE: Final = 0.01
"""What is allowed beside, in nats: of nearly nothing a multiple is nothing."""

_STRIDE: Final = 7919
"""From one token of the probe to the next, modulo the vocabulary: a prime, so that they differ."""

_DTYPES: Final[dict[str, type[np.generic]]] = {"tensor(float)": np.float32, "tensor(int8)": np.int8}

Logits = NDArray[np.float32]


def compute_probe_logits(graph: Graph, manifest: Manifest, pieces: Sequence[int] = (TOKENS,)) -> Logits:
    """Return the logits of some tokens, float32 [n, V], computed in passes of so many of them."""
    count = min(sum(pieces), manifest.context)
    tokens = np.arange(1, count + 1, dtype=np.int64) * _STRIDE % manifest.vocab_size
    inputs = {value.name: value for value in graph.get_inputs()}
    memory: dict[str, NDArray[Any]] = {
        name: np.zeros((1, value.shape[1], count, value.shape[3]), _DTYPES[value.type])
        for name, value in inputs.items()
        if name.startswith("past.")
    }
    presents = [name.replace("past.", "present.") for name in memory]
    logits: list[Logits] = []
    start = 0
    for size in pieces:
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
        found, *kept = graph.run(["logits", *presents], {**feeds, **memory})
        memory = dict(zip(memory, kept, strict=True))
        logits.append(found)
        start = end
    return np.concatenate(logits)


def check_divergence(found: Logits, expected: Logits, exact: Logits) -> tuple[float, float]:
    """Return how far our logits and onnxruntime's are from those of exact activations, in nats.

    Raises `EdgelmError` where ours are too far away for what rounding explains.
    """
    if not (np.isfinite(expected).all() and np.isfinite(exact).all()):
        raise EdgelmError("onnxruntime's own logits are not numbers: there is nothing to compare them with")
    ours, theirs = (float(kl_divergences(exact, logits).mean()) for logits in (found, expected))
    if not ours <= FACTOR * theirs + DIVERGENCE_TOLERANCE:
        raise EdgelmError(f"they compute other logits: {ours:.3g} nats from exact ones, onnxruntime's {theirs:.3g}")
    return ours, theirs
