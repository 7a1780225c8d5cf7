"""Calibration: each matrix is quantized for its inputs in the partly quantized model.

Two streams of hidden states are computed layer by layer, one in the unquantized and one in the quantized model. The
quantized stream gives a matrix's input moments; the difference of the two is the drift to compensate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ..architectures.weights import LAYER_PARTS
from ..checkpoint.matrix_reader import LazyMatrix
from ..progress_callback import ProgressCallback
from ..quantize.moments import Moments, add_lookup_weight
from .hidden_states import HiddenStates
from .layers import LayerSubgraph, ReferenceModel
from .moment_sums import MomentAccumulator
from .release_memory import release_free_memory
from .text_samples import Document

MIN_HEAD_TOKENS: Final = 2048
"""Minimum positions for the moments of a tied head, and at least four times its inputs. The unquantized model runs once
more for them."""

MAX_FLOAT64_COLUMNS: Final = 2048
"""A matrix with more inputs has its moments summed in float32, over `WIDE_MATRIX_TOKENS` positions or twice its
inputs: the cost grows with the square of the inputs."""

WIDE_MATRIX_TOKENS: Final = 8192

HELD_OUT_INTERVAL: Final = 8
"""One of this many documents is held out: not in the sums, but used to check the calibrated matrix."""

MAX_HELD_OUT_TOKENS: Final = 1024
"""Approximate maximum of held-out positions."""

MAX_FLOAT32_STATE_BYTES: Final = 256 << 20
"""Maximum bytes of a stream's hidden states in float32; above that they are kept as float16."""

MAX_INNER_BYTES: Final = 256 << 20
"""Maximum bytes of an MLP's inner activations in each stream; above that they are computed again when needed."""

Array = NDArray[np.float32]


class MatrixSink(Protocol):
    """Quantizes and stores matrices."""

    def __call__(self, name: str, rows: LazyMatrix, moments: Moments | None) -> LazyMatrix:
        """Store a matrix [N, K], calibrated if there are moments; return it as it reads back."""

    def is_calibrated(self, name: str) -> bool:
        """Return whether a matrix is calibrated, so that its moments are needed."""


def calibrate(
    layers: ReferenceModel, documents: Sequence[Document], store: MatrixSink, progress: ProgressCallback
) -> None:
    """Store every matrix of the model, in the order of the graph."""
    _Calibrator(layers, documents, store, progress).run()


class _CalibrationStream:
    """A model's hidden states of all documents, and the inputs of the current matrix."""

    def __init__(self, hidden: Sequence[Array], *, is_float16: bool, keeps_inner: bool) -> None:
        self.hidden = HiddenStates(enumerate(hidden), is_float16=is_float16)
        self.matrix_inputs = HiddenStates()
        self._is_float16 = is_float16
        self._keeps_inner = keeps_inner
        self._inner: LayerSubgraph | None = None
        """Computes an MLP's inner activations from its input, if these are not kept."""

    def start_layer(self, piece: LayerSubgraph) -> None:
        """Begin a layer: compute the inputs of its first matrix."""
        self._inner = None
        values = ((n, _next(piece, None, self.hidden[n])) for n in range(len(self.hidden)))
        self.matrix_inputs = HiddenStates(values, is_float16=self._is_float16)

    def matrix_input(self, n: int) -> Array:
        """Return the inputs of the current matrix for document n, float32 [positions, inputs]."""
        value = self.matrix_inputs[n]
        return value if self._inner is None else _next(self._inner, value, self.hidden[n])

    def advance(self, n: int, piece: LayerSubgraph, value: Array) -> Array:
        """Run document n through the part whose matrix has the input `value`; return the residual stream after it."""
        following, residual = piece.run(value, self.hidden[n])
        if piece.name in ("output", "down"):
            self.hidden[n] = residual
        if following is not None:
            self.matrix_inputs[n] = following
        return residual

    def pass_gate_up(self, piece: LayerSubgraph) -> None:
        """Continue from an MLP's input to its inner activations, now or when they are needed."""
        if not self._keeps_inner:
            self._inner = piece
            return
        for n in range(len(self.hidden)):
            self.advance(n, piece, self.matrix_inputs[n])


class _Calibrator:
    def __init__(
        self, layers: ReferenceModel, documents: Sequence[Document], store: MatrixSink, progress: ProgressCallback
    ) -> None:
        self._layers = layers
        self._decoder = layers.weights.decoder
        self._documents = documents
        self._store = store
        self._progress = progress
        self._held_out = _held_out_documents(documents)

    def run(self) -> None:
        layers, weights, tied = self._layers, self._layers.weights, self._decoder.has_tied_head
        table = self._store("embedding", weights.embedding(), self._tied_moments() if tied else None)
        positions, d = sum(map(len, self._documents)), self._decoder
        is_float16 = (
            4 * positions * (d.hidden_size + max(d.mlp_size, d.heads * d.padded_head_size)) > MAX_FLOAT32_STATE_BYTES
        )
        keeps_inner = (2 if is_float16 else 4) * positions * d.mlp_size <= MAX_INNER_BYTES
        self._unquantized = _CalibrationStream(
            layers.embed(self._documents), is_float16=is_float16, keeps_inner=keeps_inner
        )
        self._quantized = _CalibrationStream(
            layers.embed(self._documents, table), is_float16=is_float16, keeps_inner=keeps_inner
        )
        del table  # it is large
        release_free_memory()
        for i in range(len(self._decoder.layers)):
            self._layer(i)
        if not tied:
            self._store("head", weights.head(), self._head_moments())

    def _tied_moments(self) -> Moments | None:
        """Return the moments of the tied head, with the lookup weight added; None if it is not calibrated."""
        if not self._store.is_calibrated("embedding"):
            return None
        layers, width = self._layers, self._decoder.hidden_size
        documents = self._sample(max(MIN_HEAD_TOKENS, 4 * width))
        hidden, count = layers.embed(documents), len(self._decoder.layers)
        for i in range(count):
            self._progress("calibrating the head", i, count)
            hidden = layers.load_layer(i).forward(hidden)
        sums = MomentAccumulator((self._decoder.vocab_size, width))
        for number, states in enumerate(hidden):
            sums.add(layers.apply_final_norm(states), is_held_out=number % HELD_OUT_INTERVAL == HELD_OUT_INTERVAL - 1)
        return add_lookup_weight(sums.moments())

    def _head_moments(self) -> Moments:
        sums = MomentAccumulator((self._decoder.vocab_size, self._decoder.hidden_size))
        for n in range(len(self._documents)):
            sums.add(
                self._layers.apply_final_norm(self._quantized.hidden[n]),
                self._layers.apply_final_norm(self._unquantized.hidden[n]),
            )
        return sums.moments()

    def _layer(self, i: int) -> None:
        start = self._layers.load_part(i, "start")
        self._unquantized.start_layer(start)
        self._quantized.start_layer(start)
        is_last = i + 1 == len(self._decoder.layers)
        for part in LAYER_PARTS:
            weight = self._layers.weights.layer(i, part)
            piece = self._layers.load_part(i, part, weight)
            moments = self._moments(part, weight, piece)
            stored = self._store(f"layer.{i}.{part}", LazyMatrix.from_array(weight), moments).read_all()
            del moments, weight
            release_free_memory()
            own = self._layers.load_part(i, part, stored)
            del stored
            if part == "gate_up":
                self._unquantized.pass_gate_up(piece)
                self._quantized.pass_gate_up(own)
            elif not (part == "down" and is_last and self._decoder.has_tied_head):  # nothing reads the result
                for n in range(len(self._documents)):
                    self._quantized.advance(n, own, self._quantized.matrix_input(n))

    def _moments(self, part: str, weight: Array, piece: LayerSubgraph) -> Moments:
        """Return a matrix's moments. The unquantized stream advances to the next matrix, except for gate_up."""
        rows, columns = weight.shape
        sums = MomentAccumulator((rows, columns), weight, sums_float32=columns > MAX_FLOAT64_COLUMNS)
        summed = set(
            self._sample_numbers(max(WIDE_MATRIX_TOKENS, 2 * columns))
            if columns > MAX_FLOAT64_COLUMNS
            else range(len(self._documents))
        )
        adds = part in ("output", "down")
        for n in range(len(self._documents)):
            full, before = self._unquantized.matrix_input(n), self._unquantized.hidden[n]
            after = before if part == "gate_up" else self._unquantized.advance(n, piece, full)
            held = n in self._held_out
            if n not in summed and not held:
                continue
            drift = weights = None
            if adds and self._decoder.post_norm:
                weights = _inverse_mean_square(full @ weight.T)
            elif adds:
                drift, weights = before - self._quantized.hidden[n], _inverse_mean_square(after)
            sums.add(self._quantized.matrix_input(n), full, drift, weights, is_held_out=held)
        return sums.moments()

    def _sample_numbers(self, tokens: int) -> range:
        """Return numbers of documents at even distances, with about `tokens` tokens in total."""
        return range(0, len(self._documents), max(1, sum(map(len, self._documents)) // tokens))

    def _sample(self, tokens: int) -> list[Document]:
        """Return the documents of `_sample_numbers`."""
        return [self._documents[n] for n in self._sample_numbers(tokens)]


def _held_out_documents(documents: Sequence[Document]) -> set[int]:
    """Return the numbers of the held-out documents; none if there are too few documents."""
    held: set[int] = set()
    tokens = 0
    for n in range(HELD_OUT_INTERVAL - 1, len(documents), HELD_OUT_INTERVAL):
        if tokens >= MAX_HELD_OUT_TOKENS:
            break
        held.add(n)
        tokens += len(documents[n])
    return held


def _inverse_mean_square(values: Array) -> Array:
    """Return 1 / mean square of each position, [n, width] -> [n]: the weight of an error before a norm."""
    mean_square = np.mean(np.square(values, dtype=np.float32), axis=1)
    weights: Array = np.float32(1) / np.maximum(mean_square, np.float32(1e-12))
    return weights


def _next(part: LayerSubgraph, value: Array | None, residual: Array) -> Array:
    following, _ = part.run(value, residual)
    if following is None:
        raise AssertionError(f"the part {part.name} has no next value")
    return following
