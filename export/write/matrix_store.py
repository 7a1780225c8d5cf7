"""Every matrix of a decoder into the data file, each as the plan says, one at a time."""

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
"""How many times as large as a matrix's largest weight a calibrated one's may be. A channel that hardly varies takes up
others' errors by large weights, which the text that calibrated it justifies and another one may not."""


def planned_matrix(name: str, rows: int, columns: int, spec: QuantSpec | None) -> Matrix:
    """Return how a matrix is going to be stored, if its scales fit float16."""
    if spec is None:
        return Matrix(name, rows, columns, 32)
    return Matrix(name, rows, columns, spec.bits, spec.block_size, spec.symmetric, spec.accuracy_level, spec.method, 16)


@dataclass(slots=True)
class MatrixWriter:
    """Quantizes matrices by a plan and writes them; `matrices` says how each is stored, in the order they came.

    With `measure` the relative root mean square error of each goes into `errors`.
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
        """Store a matrix; return it as it will be read. See `calibrate.Store`."""
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
        """See `calibrate.Store`."""
        spec = self.plan.spec(name)
        return spec is not None and needs_calibration(spec.method)

    def _quantize(
        self, name: str, rows: LazyMatrix, spec: QuantSpec, moments: Moments | None
    ) -> tuple[PackedMatrix, QuantSpec]:
        """Return the packed matrix and the spec that was used: without calibration if that is better or inevitable."""
        method = load_method(spec.method)
        importance = self.weights.importance(name) if method.uses_importance else None
        if method.needs_moments:
            calibrated = None if moments is None else quantize_calibrated(rows, spec, moments, importance)
            if calibrated is not None:
                return calibrated, spec
            spec = without_calibration(spec)  # an untied embedding has no inputs, so no moments
        return quantize_matrix(rows, spec, importance=importance), spec


def store_matrices(store: MatrixWriter, documents: Sequence[Document] | None = None) -> dict[str, Matrix]:
    """Quantize and write all matrices, calibrated where there are documents; return how each is stored, by name."""
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
    """Quantize a matrix, a piece at a time where nothing but its own rows counts; see `Quantizer`."""
    largest = max(float(np.abs(chunk).max()) for chunk in rows.chunks())
    quantizer = Quantizer(
        spec, importance=importance, moments=moments, scale_dtype=choose_scale_dtype(largest, spec.bits)
    )
    return PackedMatrix.join_rows([quantizer.quantize(chunk) for chunk in rows.chunks()])


def quantize_calibrated(
    rows: LazyMatrix, spec: QuantSpec, moments: Moments, importance: NDArray[np.float32] | None
) -> PackedMatrix | None:
    """Quantize a matrix with what calibration says of its inputs, first moved to make up for earlier errors.

    Returns None where the result serves the held-back positions no better than a matrix quantized without calibration,
    or has a value more than `MAX_WEIGHT_GROWTH` times as large as the matrix has.
    """
    moved = rows
    if moments.input_drift is not None or moments.residual_drift is not None:
        moved = LazyMatrix.of(compensate_drift(rows.whole(), moments))
    packed = quantize_matrix(moved, spec, moments)
    if moments.held_out is None:
        return packed
    plain = quantize_matrix(rows, without_calibration(spec), importance=importance)
    (error, growth), (other, _) = (_held_out_error(rows, each, moments.held_out) for each in (packed, plain))
    return packed if error < other and growth <= MAX_WEIGHT_GROWTH else None


def _held_out_error(rows: LazyMatrix, packed: PackedMatrix, held: HeldOut) -> tuple[float, float]:
    """Return the output error on held-back positions, and how many times as large the largest value has become."""
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
