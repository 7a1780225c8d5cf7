"""Measures the sensitivity of each matrix: the KL divergence of the whole model if only that matrix is quantized.

Mixed-precision methods since HAWQ (Dong et al. 2019, arXiv:1905.03696) recommend a per-matrix measure of the network's
output over the error of the weights; these networks are small enough to measure it directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from edgelm.runtime.divergence import DivergenceMeter

from ..architectures.weights import LAYER_PARTS
from ..checkpoint.matrix_reader import LazyMatrix
from ..progress_callback import ProgressCallback
from ..quantize.matrix_plan import QuantPlan, without_calibration
from ..quantize.pack import dequantize
from ..quantize.quantizer import Quantizer
from ..quantize.spec import QuantSpec
from .layers import ReferenceModel
from .text_samples import Document, position_ranges

SAMPLED_ROWS: Final = 1024
"""Minimum rows that an estimate of a matrix's error is measured on."""


def measure_sensitivity(
    layers: ReferenceModel, documents: Sequence[Document], plan: QuantPlan, progress: ProgressCallback
) -> dict[str, float]:
    """Return the mean KL divergence in nats for each matrix quantized alone by the plan, by matrix name.

    Each layer is loaded once. The hidden states of every variant are in memory.
    """
    weights, count = layers.weights, len(layers.weights.decoder.layers)
    streams = {
        "embedding": layers.embed(documents, _quantize_and_dequantize(weights.embedding(), plan.spec("embedding")))
    }
    base = layers.embed(documents)
    for i in range(count):
        progress("sensitivity", i, count)
        plain = layers.load_layer(i)
        streams = {name: plain.forward(hidden) for name, hidden in streams.items()}
        for part in LAYER_PARTS:
            name = f"layer.{i}.{part}"
            rounded = _quantize_and_dequantize(
                LazyMatrix.from_array(weights.layer(i, part)), plan.spec(name)
            ).read_all()
            streams[name] = plain.with_part(layers.load_part(i, part, rounded)).forward(base)
        base = plain.forward(base)
    head = layers.head().read_all()
    tied = weights.decoder.has_tied_head
    rounded = _quantize_and_dequantize(layers.head(), plan.spec("embedding" if tied else "head")).read_all()
    heads = {name: rounded if tied and name == "embedding" else head for name in streams}
    if not tied:
        streams["head"], heads["head"] = base, rounded
    divergences = {name: DivergenceMeter() for name in streams}
    for number, document in enumerate(documents):
        for start, stop in position_ranges(document):
            following = document[start + 1 : stop + 1]
            expected = layers.logits(layers.apply_final_norm(base[number][start:stop]), head)
            for name, hidden in streams.items():
                found = layers.logits(layers.apply_final_norm(hidden[number][start:stop]), heads[name])
                divergences[name].add(expected, found, following)
    return {name: divergence.result().kl_mean for name, divergence in divergences.items()}


def relative_error(rows: LazyMatrix, spec: QuantSpec | None) -> float:
    """Return the squared error of a quantized matrix divided by its squared size; large matrices are sampled."""
    if spec is None:
        return 0.0
    step = max(1, rows.shape[0] // SAMPLED_ROWS)
    weight = np.concatenate([chunk[::step] for chunk in rows.chunks()])
    error = dequantize(Quantizer(without_calibration(spec)).quantize(weight)).astype(np.float64) - weight
    return float(np.square(error).sum() / max(np.square(weight, dtype=np.float64).sum(), 1e-30))


def _quantize_and_dequantize(rows: LazyMatrix, spec: QuantSpec | None) -> LazyMatrix:
    """Return a matrix as it reads back after quantization."""
    if spec is None:
        return rows
    quantizer = Quantizer(without_calibration(spec))
    return LazyMatrix(rows.shape, lambda start, stop: dequantize(quantizer.quantize(rows.read(start, stop))))
