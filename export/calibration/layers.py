"""Runs the unquantized model part by part, as float32 graphs with one matrix in memory at a time.

Calibration, sensitivity and the quality gate use it. Documents are sequences of token ids, at most `length` long; the
hidden states of a document are float32 [n, width].
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
"""Parts of a layer: the nodes before its first matrix, then each matrix with the nodes after it."""


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """A decoder that runs on documents of at most `length` tokens. Methods raise `CheckpointError` for a bad tensor."""

    weights: DecoderWeights
    length: int
    threads: int = field(default_factory=default_threads)

    def embed(self, documents: Sequence[Document], table: LazyMatrix | None = None) -> list[Array]:
        """Return the embeddings of each document, float32 [n, hidden]; from another table [vocab, hidden] if given."""
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

    def load_part(self, i: int, part: str, weight: Array | None = None) -> LayerSubgraph:
        """Load a part of layer `i`, with `weight` in place of the checkpoint's matrix if given."""
        return LayerSubgraph(self, i, part, weight)

    def load_layer(self, i: int) -> LoadedLayer:
        """Load layer `i`."""
        return LoadedLayer([self.load_part(i, part) for part in PARTS])

    def apply_final_norm(self, hidden: Array) -> Array:
        """Apply the last norm: [n, hidden] -> [n, hidden]."""
        d = self.weights.decoder
        mean_square = np.mean(np.square(hidden, dtype=np.float32), axis=-1, keepdims=True)
        normed: Array = hidden / np.sqrt(mean_square + np.float32(d.norm_epsilon)) * self.weights.final_norm()
        return normed

    def logits(self, final: Array, head: Array) -> Array:
        """Return logits [n, vocab] of normed hidden states; head: [vocab, hidden]."""
        product: Array = final @ head.T
        cap = self.weights.decoder.logit_softcap
        return product if cap is None else np.tanh(product) * np.float32(cap)

    def head(self) -> LazyMatrix:
        """Return the head, or the embedding if they are tied, [vocab, hidden]."""
        return self.weights.embedding() if self.weights.decoder.has_tied_head else self.weights.head()


class LayerSubgraph:
    """One loaded part of a layer."""

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
        self._needs_positions = needs_positions(d, layers.length)

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
        if self._needs_positions:
            late = self._long_from is not None and count > self._long_from
            first = self._length if late else 0
            feeds["positions"] = np.arange(first, first + count, dtype=np.int64)[None]
        return feeds


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """A loaded layer."""

    parts: Sequence[LayerSubgraph]

    def forward(self, hidden: Iterable[Array]) -> list[Array]:
        """Return the hidden states [n, hidden] of each document after the layer."""
        stepped = []
        for residual in hidden:
            value: Array | None = None
            for part in self.parts:
                value, residual = part.run(value, residual)
            stepped.append(residual)
        return stepped

    def with_part(self, part: LayerSubgraph) -> LoadedLayer:
        """Return the layer with one part replaced."""
        return LoadedLayer([part if each.name == part.name else each for each in self.parts])
