"""Calibration: every matrix is quantized on what reaches it through the already quantized ones before it.

Two streams of hidden states run side by side, one through the unquantized model and one through the quantized, a layer
at a time: the second gives a matrix's input moments, the difference of both says what it is to make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from .documents import Document
from .layers import Layers, Part
from .quantize.moments import Moments, with_lookup
from .rows import Rows
from .states import States
from .weights import LAYER_PARTS

HEAD_TOKENS: Final = 8192
"""Positions that tell the moments of a tied head, for which the unquantized model has to run once more."""

WIDE: Final = 2048
"""A matrix with more inputs than this takes its moments from twice as many positions: they cost inputs squared."""

Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]


class Store(Protocol):
    """What quantizes a matrix and puts it away."""

    def __call__(self, name: str, rows: Rows, moments: Moments | None) -> Rows:
        """Store a matrix [N, K], calibrated if there are moments; return it as it will be read."""


def calibrate(layers: Layers, documents: Sequence[Document], store: Store, progress: Progress) -> None:
    """Store every matrix of the model, in the order of the graph."""
    _Calibration(layers, documents, store, progress).run()


class _Calibration:
    def __init__(self, layers: Layers, documents: Sequence[Document], store: Store, progress: Progress) -> None:
        self._layers = layers
        self._decoder = layers.weights.decoder
        self._documents = documents
        self._store = store
        self._progress = progress
        self._every = range(len(documents))

    def run(self) -> None:
        layers, weights = self._layers, self._layers.weights
        tied = self._decoder.tied
        table = self._store("embedding", weights.embedding(), self._tied_moments() if tied else None)
        self._full = States(layers.embed(self._documents))
        self._own = States(layers.embed(self._documents, table))
        for i in range(len(self._decoder.layers)):
            self._layer(i)
        if not tied:
            self._store("head", weights.head(), self._head_moments())

    def _tied_moments(self) -> Moments:
        """Return the moments of what the head multiplies, widened for the lookup's sake."""
        layers, documents = self._layers, [self._documents[n] for n in self._sample(HEAD_TOKENS)]
        hidden, count = layers.embed(documents), len(self._decoder.layers)
        for i in range(count):
            self._progress("calibrating the head", i, count)
            hidden = layers.layer(i).step(hidden)
        final = [layers.final(states) for states in hidden]
        second = sum((x.T @ x for x in final), np.zeros((self._decoder.hidden_size,) * 2, np.float64))
        return with_lookup(Moments(second, count=sum(map(len, final))))

    def _head_moments(self) -> Moments:
        pairs = ((self._layers.final(self._full[n]), self._layers.final(self._own[n])) for n in self._every)
        second = np.zeros((self._decoder.hidden_size,) * 2, np.float64)
        cross = second.copy()
        count = 0
        for full, own in pairs:
            second += own.T @ own
            cross += (full - own).T @ own
            count += len(own)
        return Moments(second, cross, count=count)

    def _layer(self, i: int) -> None:
        start = self._layers.part(i, "start")
        self._full_values, self._own_values = (
            States(self._next(start, None, states[n]) for n in self._every) for states in (self._full, self._own)
        )
        stored: dict[str, Array] = {}
        for part in LAYER_PARTS:
            # What the last matrix multiplies is wide: it is computed again from its narrow origin where it is needed.
            before = self._pieces(i, "gate_up", stored) if part == "down" else None
            weight = self._layers.weights.layer(i, part)
            moments = self._moments(part, weight, before)
            del before  # quantizing needs the memory
            stored[part] = self._store(f"layer.{i}.{part}", Rows.of(weight), moments).whole()
            del weight, moments
            if part == "gate_up":
                continue
            before = self._pieces(i, "gate_up", stored) if part == "down" else None
            pieces = self._pieces(i, part, stored)
            for n in self._every:
                self._advance(n, pieces, before)

    def _pieces(self, i: int, part: str, stored: dict[str, Array]) -> tuple[Part, Part]:
        """Load a piece of both models."""
        return self._layers.part(i, part), self._layers.part(i, part, stored[part])

    def _advance(self, n: int, pieces: tuple[Part, Part], before: tuple[Part, Part] | None) -> None:
        """Run a document of both streams through a piece."""
        values, streams = (self._full_values, self._own_values), (self._full, self._own)
        inputs = self._inputs(n, before)
        for piece, value, states, stream in zip(pieces, inputs, values, streams, strict=True):
            following, residual = piece.run(value, stream[n])
            if piece.name != "qkv":
                stream[n] = residual
            if following is not None:
                states[n] = following

    def _inputs(self, n: int, before: tuple[Part, Part] | None) -> tuple[Array, Array]:
        """Return what a matrix multiplies, in the unquantized and in the quantized model."""
        full, own = self._full_values[n], self._own_values[n]
        if before is None:
            return full, own
        return self._next(before[0], full, self._full[n]), self._next(before[1], own, self._own[n])

    def _moments(self, part: str, weight: Array, before: tuple[Part, Part] | None) -> Moments:
        rows, columns = weight.shape
        wide = columns > WIDE
        added = part in ("output", "down") and not self._decoder.post_norm
        second = np.zeros((columns, columns), np.float32 if wide else np.float64)
        # What the matrix is to make up for, in whichever form is smaller: of its inputs, or of its outputs.
        cross = np.zeros((columns, columns), np.float64) if columns <= rows else None
        residual = np.zeros((rows, columns), np.float64) if added or cross is None else None
        count = 0
        for n in self._sample(2 * columns) if wide else self._every:
            full, own = self._inputs(n, before)
            second += own.T @ own
            count += len(own)
            drift = full - own
            if cross is not None:
                cross += drift.T @ own
            if residual is not None:
                missing = np.zeros((len(own), rows), np.float32) if cross is not None else drift @ weight.T
                if added:
                    missing += self._full[n] - self._own[n]
                residual += missing.T @ own
        return Moments(second, cross, residual, count)

    def _sample(self, tokens: int) -> list[int]:
        """Return documents evenly from the first to the last, of about so many tokens in all."""
        total = sum(len(document) for document in self._documents)
        step = max(1, total // tokens)
        return list(self._every[::step])

    @staticmethod
    def _next(part: Part, value: Array | None, residual: Array) -> Array:
        following, _ = part.run(value, residual)
        if following is None:
            raise AssertionError(f"the piece {part.name} has no next value")
        return following
