"""Quantizes the matrices of a decoder by the plan and writes them to the data file, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.manifest import Matrix

from ..architectures.weights import DecoderWeights
from ..calibration.calibrate import calibrate
from ..calibration.layers import ReferenceModel
from ..calibration.text_samples import Document
from ..checkpoint.matrix_reader import LazyMatrix
from ..graph.initializers import FileInitializers
from ..graph.matrices import store_float, store_packed
from ..progress_callback import ProgressCallback
from ..quantize.keep import read_kept_matrix
from ..quantize.matrix_plan import TOKEN_MATRICES, QuantPlan, without_calibration
from ..quantize.methods import load_method, needs_calibration
from ..quantize.moments import HeldOut, Moments, compensate_drift, output_error
from ..quantize.pack import PackedMatrix, dequantize
from ..quantize.quantizer import Quantizer, choose_scale_dtype
from ..quantize.spec import KEEP, QuantSpec

MAX_WEIGHT_GROWTH: Final = 4
"""Largest ratio of a calibrated matrix's largest weight to the original's. GPTQ can correct errors by large weights in
a channel that hardly varies in the calibration text but may vary in other text."""


def planned_matrix(name: str, rows: int, columns: int, spec: QuantSpec | None) -> Matrix:
    """Return how a matrix will be stored, if its scales fit float16."""
    if spec is None:
        return Matrix(name, rows, columns, 32)
    return Matrix(name, rows, columns, spec.bits, spec.block_size, spec.symmetric, spec.accuracy_level, spec.method, 16)


@dataclass(slots=True)
class MatrixWriter:
    """Quantizes matrices by a plan and writes them. `matrices`: how each is stored, by name, in the order of the calls.

    With `measure`, the relative root mean square error of each is in `errors`.
    """

    weights: DecoderWeights
    plan: QuantPlan
    initializers: FileInitializers
    progress: ProgressCallback
    total: int
    measure: bool = False
    matrices: dict[str, Matrix] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    _done: int = 0

    def __call__(self, name: str, rows: LazyMatrix, moments: Moments | None = None) -> LazyMatrix:
        """Store a matrix; return it as it reads back. See `calibrate.MatrixSink`."""
        self.progress("quantizing", self._done, self.total)
        spec = self.plan.spec(name)
        if spec is None:
            self.matrices[name] = store_float(self.initializers, name, rows, table=name in TOKEN_MATRICES)
            read = rows
        else:
            if spec.method == KEEP:
                packed = read_kept_matrix(self.weights, name)
            else:
                packed, spec = self._quantize(name, rows, spec, moments)
            self.matrices[name] = store_packed(self.initializers, name, packed, spec)
            read = LazyMatrix(rows.shape, lambda start, stop: dequantize(packed.rows(start, stop)))
        self._done += self.matrices[name].bytes()
        if self.measure:
            self.errors[name] = _relative_error(rows, read)
        return read

    def is_calibrated(self, name: str) -> bool:
        """See `calibrate.MatrixSink`."""
        spec = self.plan.spec(name)
        return spec is not None and needs_calibration(spec.method)

    def _quantize(
        self, name: str, rows: LazyMatrix, spec: QuantSpec, moments: Moments | None
    ) -> tuple[PackedMatrix, QuantSpec]:
        """Return the packed matrix and its spec: without calibration if there are no moments or it loses more."""
        method = load_method(spec.method)
        importance = self.weights.importance(name) if method.uses_importance else None
        if method.needs_moments:
            calibrated = None if moments is None else quantize_calibrated(rows, spec, moments, importance)
            if calibrated is not None:
                return calibrated, spec
            spec = without_calibration(spec)  # an untied embedding has no inputs, so no moments
        return quantize_matrix(rows, spec, importance=importance), spec


def store_matrices(store: MatrixWriter, documents: Sequence[Document] | None = None) -> dict[str, Matrix]:
    """Quantize and write all matrices, calibrated if there are documents; return how each is stored, by name."""
    if documents is None:
        for name, rows in store.weights.matrices():
            store(name, rows)
    else:
        layers = ReferenceModel(store.weights, max(len(document) for document in documents))
        calibrate(layers, documents, store, store.progress)
    return store.matrices


def quantize_matrix(
    rows: LazyMatrix, spec: QuantSpec, moments: Moments | None = None, importance: NDArray[np.float32] | None = None
) -> PackedMatrix:
    """Quantize a matrix in chunks of rows, which do not depend on each other; see `Quantizer`."""
    largest = max(float(np.abs(chunk).max()) for chunk in rows.chunks())
    quantizer = Quantizer(
        spec, importance=importance, moments=moments, scale_dtype=choose_scale_dtype(largest, spec.bits)
    )
    return PackedMatrix.join_rows([quantizer.quantize(chunk) for chunk in rows.chunks()])


def quantize_calibrated(
    rows: LazyMatrix, spec: QuantSpec, moments: Moments, importance: NDArray[np.float32] | None
) -> PackedMatrix | None:
    """Quantize a matrix with moments, after its weights are moved to compensate for the drift of its inputs.

    Returns None if the result has a larger output error on held-out positions than the matrix quantized without
    calibration, or a value more than `MAX_WEIGHT_GROWTH` times the matrix's largest.
    """
    moved = rows
    if moments.input_drift is not None or moments.residual_drift is not None:
        moved = LazyMatrix.from_array(compensate_drift(rows.read_all(), moments))
    packed = quantize_matrix(moved, spec, moments)
    if moments.held_out is None:
        return packed
    plain = quantize_matrix(rows, without_calibration(spec), importance=importance)
    (error, growth), (other, _) = (_held_out_error(rows, each, moments.held_out) for each in (packed, plain))
    return packed if error < other and growth <= MAX_WEIGHT_GROWTH else None


def _held_out_error(rows: LazyMatrix, packed: PackedMatrix, held: HeldOut) -> tuple[float, float]:
    """Return the output error on held-out positions, and the ratio of the largest values after and before."""
    error, start, before, after = 0.0, 0, 0.0, 0.0
    for chunk in rows.chunks():
        stop = start + len(chunk)
        target = None if held.target is None else held.target[:, start:stop]
        read = dequantize(packed.rows(start, stop))
        error += output_error(chunk, HeldOut(held.inputs, target), read)
        before, after = max(before, float(np.abs(chunk).max())), max(after, float(np.abs(read).max()))
        start = stop
    return error, after / before if before else 1.0


def _relative_error(rows: LazyMatrix, read: LazyMatrix) -> float:
    error = size = 0.0
    for chunk, found in zip(rows.chunks(), read.chunks(), strict=True):
        error += float(np.square(found - chunk, dtype=np.float64).sum())
        size += float(np.square(chunk, dtype=np.float64).sum())
    return (error / size) ** 0.5 if size else 0.0
