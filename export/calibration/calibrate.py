"""Calibration: every matrix is quantized on what reaches it through the already quantized ones before it.

Two streams of hidden states run side by side, one through the unquantized model and one through the quantized, a layer
at a time: the second gives a matrix's input moments, the difference of both says what it is to make up for.
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
"""Positions, at least, that tell the moments of a tied head, for which the unquantized model has to run once more; at
least four times as many as the head has inputs."""

WIDE: Final = 2048
"""A matrix with more inputs than this has its moments summed in float32, and from `WIDE_TOKENS` positions or twice as
many as it has inputs: they cost inputs squared."""

WIDE_TOKENS: Final = 8192

HELD_OUT_EVERY: Final = 8
"""One of so many documents is held back from the sums: what calibration makes of a matrix is tried on it."""

MAX_HELD_OUT_TOKENS: Final = 1024
"""Positions held back, about, at most."""

MAX_FLOAT32_STATE_BYTES: Final = 256 << 20
"""Most bytes of a stream's states in float32; where they are more, they are kept in float16."""

MAX_INNER_BYTES: Final = 256 << 20
"""Most bytes of an MLP's inner activations in each stream; where they are more, they are computed again."""

Array = NDArray[np.float32]


class MatrixSink(Protocol):
    """What quantizes a matrix and puts it away."""

    def __call__(self, name: str, rows: LazyMatrix, moments: Moments | None) -> LazyMatrix:
        """Store a matrix [N, K], calibrated if there are moments; return it as it will be read."""

    def is_calibrated(self, name: str) -> bool:
        """Whether a matrix is to be calibrated, so that its moments are wanted."""


def calibrate(
    layers: ReferenceModel, documents: Sequence[Document], store: MatrixSink, progress: ProgressCallback
) -> None:
    """Store every matrix of the model, in the order of the graph."""
    _Calibrator(layers, documents, store, progress).run()


class _CalibrationStream:
    """A model's hidden states of all documents, and what the matrix whose turn it is multiplies in each."""

    def __init__(self, hidden: Sequence[Array], *, is_float16: bool, keeps_inner: bool) -> None:
        self.hidden = HiddenStates(enumerate(hidden), is_float16=is_float16)
        self.values = HiddenStates()
        self._narrow = is_float16
        self._keeps_inner = keeps_inner
        self._inner: LayerSubgraph | None = None
        """What computes an MLP's inner activations from its input, where these are not kept."""

    def start(self, piece: LayerSubgraph) -> None:
        """Begin a layer."""
        self._inner = None
        values = ((n, _next(piece, None, self.hidden[n])) for n in range(len(self.hidden)))
        self.values = HiddenStates(values, is_float16=self._narrow)

    def value(self, n: int) -> Array:
        """Return what the matrix multiplies, [positions, inputs]."""
        value = self.values[n]
        return value if self._inner is None else _next(self._inner, value, self.hidden[n])

    def move(self, n: int, piece: LayerSubgraph, value: Array) -> Array:
        """Run a document through a piece whose matrix multiplies `value`; return its hidden state after that."""
        following, residual = piece.run(value, self.hidden[n])
        if piece.name in ("output", "down"):
            self.hidden[n] = residual
        if following is not None:
            self.values[n] = following
        return residual

    def pass_gate_up(self, piece: LayerSubgraph) -> None:
        """Go on from an MLP's input to its inner activations, at once or where they are asked for."""
        if not self._keeps_inner:
            self._inner = piece
            return
        for n in range(len(self.hidden)):
            self.move(n, piece, self.values[n])


class _Calibrator:
    def __init__(
        self, layers: ReferenceModel, documents: Sequence[Document], store: MatrixSink, progress: ProgressCallback
    ) -> None:
        self._layers = layers
        self._decoder = layers.weights.decoder
        self._documents = documents
        self._store = store
        self._progress = progress
        self._held = _held_out_documents(documents)

    def run(self) -> None:
        layers, weights, tied = self._layers, self._layers.weights, self._decoder.tied
        table = self._store("embedding", weights.embedding(), self._tied_moments() if tied else None)
        positions, d = sum(map(len, self._documents)), self._decoder
        is_float16 = (
            4 * positions * (d.hidden_size + max(d.mlp_size, d.heads * d.padded_head_size)) > MAX_FLOAT32_STATE_BYTES
        )
        keeps_inner = (2 if is_float16 else 4) * positions * d.mlp_size <= MAX_INNER_BYTES
        self._unquantized = _CalibrationStream(
            layers.embed(self._documents), is_float16=is_float16, keeps_inner=keeps_inner
        )
        self._own = _CalibrationStream(
            layers.embed(self._documents, table), is_float16=is_float16, keeps_inner=keeps_inner
        )
        del table  # what is not needed any more is large
        release_free_memory()
        for i in range(len(self._decoder.layers)):
            self._layer(i)
        if not tied:
            self._store("head", weights.head(), self._head_moments())

    def _tied_moments(self) -> Moments | None:
        """Return the moments of what the head multiplies, widened for the lookup's sake."""
        if not self._store.is_calibrated("embedding"):
            return None
        layers, width = self._layers, self._decoder.hidden_size
        documents = self._sample(max(MIN_HEAD_TOKENS, 4 * width))
        hidden, count = layers.embed(documents), len(self._decoder.layers)
        for i in range(count):
            self._progress("calibrating the head", i, count)
            hidden = layers.layer(i).step(hidden)
        sums = MomentAccumulator((self._decoder.vocab_size, width))
        for number, states in enumerate(hidden):
            sums.add(layers.final(states), is_held_out=number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1)
        return add_lookup_weight(sums.moments())

    def _head_moments(self) -> Moments:
        sums = MomentAccumulator((self._decoder.vocab_size, self._decoder.hidden_size))
        for n in range(len(self._documents)):
            sums.add(self._layers.final(self._own.hidden[n]), self._layers.final(self._unquantized.hidden[n]))
        return sums.moments()

    def _layer(self, i: int) -> None:
        start = self._layers.part(i, "start")
        self._unquantized.start(start)
        self._own.start(start)
        is_last = i + 1 == len(self._decoder.layers)
        for part in LAYER_PARTS:
            weight = self._layers.weights.layer(i, part)
            piece = self._layers.part(i, part, weight)
            moments = self._moments(part, weight, piece)
            stored = self._store(f"layer.{i}.{part}", LazyMatrix.of(weight), moments).whole()
            del moments, weight
            release_free_memory()
            own = self._layers.part(i, part, stored)
            del stored
            if part == "gate_up":
                self._unquantized.pass_gate_up(piece)
                self._own.pass_gate_up(own)
            elif not (part == "down" and is_last and self._decoder.tied):  # nothing would read that
                for n in range(len(self._documents)):
                    self._own.move(n, own, self._own.value(n))

    def _moments(self, part: str, weight: Array, piece: LayerSubgraph) -> Moments:
        """Return a matrix's moments; the unquantized model goes on to the next matrix, but for gate and up."""
        rows, columns = weight.shape
        sums = MomentAccumulator((rows, columns), weight, wide=columns > WIDE)
        summed = set(self._spread(max(WIDE_TOKENS, 2 * columns)) if columns > WIDE else range(len(self._documents)))
        adds = part in ("output", "down")
        for n in range(len(self._documents)):
            full, before = self._unquantized.value(n), self._unquantized.hidden[n]
            after = before if part == "gate_up" else self._unquantized.move(n, piece, full)
            held = n in self._held
            if n not in summed and not held:
                continue
            drift = weights = None
            if adds and self._decoder.post_norm:
                weights = _inverse_mean_square(full @ weight.T)
            elif adds:
                drift, weights = before - self._own.hidden[n], _inverse_mean_square(after)
            sums.add(self._own.value(n), full, drift, weights, is_held_out=held)
        return sums.moments()

    def _spread(self, tokens: int) -> range:
        """Return the numbers of documents evenly from the first to the last, of about so many tokens in all."""
        return range(0, len(self._documents), max(1, sum(map(len, self._documents)) // tokens))

    def _sample(self, tokens: int) -> list[Document]:
        """Return the documents of `_spread`."""
        return [self._documents[n] for n in self._spread(tokens)]


def _held_out_documents(documents: Sequence[Document]) -> set[int]:
    """Return the numbers of the documents that are held back; none where there are too few."""
    held: set[int] = set()
    tokens = 0
    for n in range(HELD_OUT_EVERY - 1, len(documents), HELD_OUT_EVERY):
        if tokens >= MAX_HELD_OUT_TOKENS:
            break
        held.add(n)
        tokens += len(documents[n])
    return held


def _inverse_mean_square(values: Array) -> Array:
    """Return 1 / mean square of each position [n, width] -> [n]: what an error there weighs once a norm has read it."""
    mean_square = np.mean(np.square(values, dtype=np.float32), axis=1)
    weights: Array = np.float32(1) / np.maximum(mean_square, np.float32(1e-12))
    return weights


def _next(part: LayerSubgraph, value: Array | None, residual: Array) -> Array:
    following, _ = part.run(value, residual)
    if following is None:
        raise AssertionError(f"the piece {part.name} has no next value")
    return following
