"""Calibration: every matrix is quantized on what reaches it through the already quantized ones before it.

Two streams of hidden states run side by side, one through the unquantized model and one through the quantized, a layer
at a time: the second gives a matrix's input moments, the difference of both says what it is to make up for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from ..memory import give_back
from ..progress import Progress
from ..quantize.moments import Moments, with_lookup
from ..rows import Rows
from ..weights import LAYER_PARTS
from .documents import Document
from .layers import Layers, Part
from .states import States
from .sums import Sums

HEAD_TOKENS: Final = 4096
"""Positions, at least, that tell the moments of a tied head, for which the unquantized model has to run once more; at
least four times as many as the head has inputs."""

FOLLOWED_TOKENS: Final = 8192
"""Positions, at least, on which the unquantized model runs beside the quantized one, to tell how far they are apart."""

WIDE: Final = 2048
"""A matrix with more inputs than this takes its moments from the followed positions too: they cost inputs squared.
There are at least twice as many of them as inputs."""

Array = NDArray[np.float32]


class Store(Protocol):
    """What quantizes a matrix and puts it away."""

    def __call__(self, name: str, rows: Rows, moments: Moments | None) -> Rows:
        """Store a matrix [N, K], calibrated if there are moments; return it as it will be read."""


def calibrate(layers: Layers, documents: Sequence[Document], store: Store, progress: Progress) -> None:
    """Store every matrix of the model, in the order of the graph."""
    _Calibration(layers, documents, store, progress).run()


class _Stream:
    """A model's hidden states of some documents, and what the matrix whose turn it is multiplies in each."""

    def __init__(self, hidden: States) -> None:
        self.hidden = hidden
        self.values = States()

    def start(self, piece: Part, documents: Iterable[int]) -> None:
        """Begin a layer."""
        self.values = States((n, _next(piece, None, self.hidden[n])) for n in documents)

    def value(self, n: int, before: Part | None) -> Array:
        """Return what the matrix multiplies; `before` is a piece to run first."""
        value = self.values[n]
        return value if before is None else _next(before, value, self.hidden[n])

    def advance(self, n: int, piece: Part, before: Part | None) -> None:
        """Run a document through a piece."""
        self.move(n, piece, self.value(n, before))

    def move(self, n: int, piece: Part, value: Array) -> None:
        """Run a document through a piece whose matrix multiplies `value`."""
        following, residual = piece.run(value, self.hidden[n])
        if piece.name != "qkv":
            self.hidden[n] = residual
        if following is not None:
            self.values[n] = following


class _Calibration:
    def __init__(self, layers: Layers, documents: Sequence[Document], store: Store, progress: Progress) -> None:
        self._layers = layers
        self._decoder = layers.weights.decoder
        self._documents = documents
        self._store = store
        self._progress = progress
        self._every = range(len(documents))
        self._followed = self._sample(max(FOLLOWED_TOKENS, 2 * self._decoder.mlp_size))

    def run(self) -> None:
        layers, weights, tied = self._layers, self._layers.weights, self._decoder.tied
        table = self._store("embedding", weights.embedding(), self._tied_moments() if tied else None)
        followed = layers.embed([self._documents[n] for n in self._followed])
        self._full = _Stream(States(zip(self._followed, followed, strict=True)))
        self._own = _Stream(States(enumerate(layers.embed(self._documents, table))))
        del table, followed  # what is not needed any more is large
        give_back()
        for i in range(len(self._decoder.layers)):
            self._layer(i)
        if not tied:
            self._store("head", weights.head(), self._head_moments())

    def _tied_moments(self) -> Moments:
        """Return the moments of what the head multiplies, widened for the lookup's sake."""
        layers, width = self._layers, self._decoder.hidden_size
        documents = [self._documents[n] for n in self._sample(max(HEAD_TOKENS, 4 * width))]
        hidden, count = layers.embed(documents), len(self._decoder.layers)
        for i in range(count):
            self._progress("calibrating the head", i, count)
            hidden = layers.layer(i).step(hidden)
        sums = Sums((self._decoder.vocab_size, width))
        for states in hidden:
            sums.add(layers.final(states))
        return with_lookup(sums.moments())

    def _head_moments(self) -> Moments:
        sums = Sums((self._decoder.vocab_size, self._decoder.hidden_size))
        for n in self._every:
            own = self._layers.final(self._own.hidden[n])
            full = self._layers.final(self._full.hidden[n]) if n in self._full.hidden else None
            sums.add(own, full)
        return sums.moments()

    def _layer(self, i: int) -> None:
        start = self._layers.part(i, "start")
        self._full.start(start, self._followed)
        self._own.start(start, self._every)
        stored: dict[str, Array] = {}
        for part in LAYER_PARTS:
            moments = self._moments(i, part, stored)
            rows = Rows.of(self._layers.weights.layer(i, part))
            give_back()
            stored[part] = self._store(f"layer.{i}.{part}", rows, moments).whole()
            del moments, rows
            give_back()
            if part == "gate_up":
                continue  # what comes after is wide: it is computed again from its narrow origin where it is needed
            if part == "down" and self._decoder.tied and i + 1 == len(self._decoder.layers):
                continue  # nothing reads what comes out
            own, before = self._piece(i, part, stored), self._piece(i, "gate_up", stored) if part == "down" else None
            for n in self._every:
                self._own.advance(n, own, before)

    def _piece(self, i: int, part: str, stored: Mapping[str, Array]) -> Part:
        """Load a piece of the quantized model."""
        return self._layers.part(i, part, stored[part])

    def _moments(self, i: int, part: str, stored: Mapping[str, Array]) -> Moments:
        """Return a matrix's moments; the unquantized model goes on to the next matrix."""
        weight = self._layers.weights.layer(i, part)
        sums = Sums((weight.shape[0], weight.shape[1]), weight, wide=weight.shape[1] > WIDE)
        added = part in ("output", "down") and not self._decoder.post_norm
        full_piece = None if part == "gate_up" else self._layers.part(i, part)
        befores: tuple[Part | None, Part | None] = None, None
        if part == "down":
            befores = self._layers.part(i, "gate_up"), self._piece(i, "gate_up", stored)
        for n in self._followed if sums.wide else self._every:
            own, full, drift = self._own.value(n, befores[1]), None, None
            if n in self._full.hidden:
                full = self._full.value(n, befores[0])
                drift = self._full.hidden[n] - self._own.hidden[n] if added else None
            sums.add(own, full, drift)
            if full is not None and full_piece is not None:
                self._full.move(n, full_piece, full)
        return sums.moments()

    def _sample(self, tokens: int) -> list[int]:
        """Return documents evenly from the first to the last, of about so many tokens in all."""
        total = sum(len(document) for document in self._documents)
        step = max(1, total // tokens)
        return list(self._every[::step])


def _next(part: Part, value: Array | None, residual: Array) -> Array:
    following, _ = part.run(value, residual)
    if following is None:
        raise AssertionError(f"the piece {part.name} has no next value")
    return following
