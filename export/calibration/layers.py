"""The unquantized model run piece by piece: its own float32 graph, one matrix in memory at a time.

What calibration, sensitivity and the quality gate look at. Documents are sequences of token ids, each at most the
context long, and a document's hidden states are float32 [n, width].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.manifest import Matrix
from edgelm.runtime.ort import load_graph
from edgelm.runtime.threads import default_threads

from ..architectures.weights import LAYER_PARTS, DecoderWeights
from ..checkpoint.matrix_reader import LazyMatrix
from ..graph.attention_nodes import needs_positions
from ..graph.decoder_graph import DecoderGraphBuilder
from ..graph.initializers import InlineInitializers
from ..graph.nodes import GraphBuilder
from .text_samples import Document

Array = NDArray[np.float32]

PARTS: Final = ("start", *LAYER_PARTS)
"""Pieces of a layer: what comes before its first matrix, then each matrix with what follows it."""


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """A decoder over documents of at most `length` tokens. Every method raises `CheckpointError` for a bad tensor."""

    weights: DecoderWeights
    length: int
    threads: int = field(default_factory=default_threads)

    def embed(self, documents: Sequence[Document], table: LazyMatrix | None = None) -> list[Array]:
        """Return the embeddings [n, hidden] of each document; of another table [vocab, hidden] if given."""
        table = self.weights.embedding() if table is None else table
        tokens = np.concatenate(documents)
        hidden = np.empty((len(tokens), table.shape[1]), np.float32)
        start = 0
        for chunk in table.chunks():
            here = (tokens >= start) & (tokens < start + len(chunk))
            hidden[here] = chunk[tokens[here] - start]
            start += len(chunk)
        hidden *= np.float32(self.weights.decoder.embedding_scale)
        return np.split(hidden, np.cumsum([len(document) for document in documents])[:-1])

    def part(self, i: int, part: str, weight: Array | None = None) -> LayerSubgraph:
        """Load a piece of layer `i`, with another matrix than the checkpoint's where `weight` is given."""
        return LayerSubgraph(self, i, part, weight)

    def layer(self, i: int) -> LoadedLayer:
        """Load layer `i`."""
        return LoadedLayer([self.part(i, part) for part in PARTS])

    def final(self, hidden: Array) -> Array:
        """Return what the head multiplies: [n, hidden] -> [n, hidden]."""
        d = self.weights.decoder
        mean_square = np.mean(np.square(hidden, dtype=np.float32), axis=-1, keepdims=True)
        normed: Array = hidden / np.sqrt(mean_square + np.float32(d.norm_epsilon)) * self.weights.final_norm()
        return normed

    def logits(self, final: Array, head: Array) -> Array:
        """Return logits [n, vocab] of what the head multiplies; head: [vocab, hidden]."""
        product: Array = final @ head.T
        cap = self.weights.decoder.logit_softcap
        return product if cap is None else np.tanh(product) * np.float32(cap)

    def head(self) -> LazyMatrix:
        """Return the matrix that gives the logits, [vocab, hidden]."""
        return self.weights.embedding() if self.weights.decoder.tied else self.weights.head()


class LayerSubgraph:
    """One piece of a layer, loaded."""

    def __init__(self, layers: ReferenceModel, i: int, part: str, weight: Array | None) -> None:
        self.name = part
        self._i = i
        self._length = layers.length
        d = layers.weights.decoder
        constants = InlineInitializers()
        matrices: dict[str, Matrix] = {}
        if part in LAYER_PARTS:
            weight = layers.weights.layer(i, part) if weight is None else weight
            name = f"layer.{i}.{part}"
            constants.add(f"{name}.weight", np.ascontiguousarray(weight.T))
            matrices[name] = Matrix(name, weight.shape[0], weight.shape[1], 32)
        model = DecoderGraphBuilder(layers.weights, matrices, layers.length, GraphBuilder(constants)).build_part(
            i, part
        )
        constants.tensors.clear()
        self._graph = load_graph(model.SerializeToString(), layers.threads, spin=False)
        self._past = np.zeros((1, d.kv_heads, 0, d.padded_head_size), np.float32)
        self._long_from = d.long_from(layers.length)
        self._positions = needs_positions(d, layers.length)

    def run(self, value: Array | None, residual: Array) -> tuple[Array | None, Array]:
        """Return (next value, residual) of one document; see `DecoderGraphBuilder.build_part`."""
        feeds: dict[str, NDArray[Any]] = {}
        if self.name in ("start", "output", "down"):
            feeds["residual"] = residual[None]
        if value is not None and self.name != "start":
            feeds["value"] = value[None]
        if self.name == "qkv":
            feeds.update(self._lengths(len(residual)))
        if self.name in ("start", "qkv", "gate_up"):
            return self._graph.run(["next"], feeds)[0][0], residual
        if self.name == "down":
            return None, self._graph.run(["after"], feeds)[0][0]
        following, after = self._graph.run(["next", "after"], feeds)
        return following[0], after[0]

    def _lengths(self, count: int) -> dict[str, NDArray[Any]]:
        feeds: dict[str, NDArray[Any]] = {
            "seqlens_k": np.array([count - 1], np.int32),
            "total_sequence_length": np.array([count], np.int32),
            f"past.{self._i}.key": self._past,
            f"past.{self._i}.value": self._past,
        }
        if self._positions:
            late = self._long_from is not None and count > self._long_from
            first = self._length if late else 0
            feeds["positions"] = np.arange(first, first + count, dtype=np.int64)[None]
        return feeds


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A whole layer, loaded."""

    parts: Sequence[LayerSubgraph]

    def step(self, hidden: Iterable[Array]) -> list[Array]:
        """Return the hidden states [n, hidden] of each document after the layer."""
        stepped = []
        for residual in hidden:
            value: Array | None = None
            for part in self.parts:
                value, residual = part.run(value, residual)
            stepped.append(residual)
        return stepped

    def replaced(self, part: LayerSubgraph) -> LoadedLayer:
        """Return the layer with another piece in the place of its own."""
        return LoadedLayer([part if each.name == part.name else each for each in self.parts])
