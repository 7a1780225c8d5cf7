"""The decoder's weights as the graph wants them: projections packed, heads padded, scales folded in.

A head whose size the attention kernel does not take is padded with zeros at its end, which changes no result. One
layer's tensors are in memory at a time; embedding and head are read in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import TensorSource
from ..checkpoint.matrix_reader import LazyMatrix
from .decoder import DecoderConfig, TensorNames

Array = NDArray[np.float32]

LAYER_PARTS: Final = ("qkv", "output", "gate_up", "down")
"""Matrices of a layer, in the order they are computed."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Reads a checkpoint's tensors for a decoder. Every method raises `CheckpointError` for a bad tensor."""

    source: TensorSource
    decoder: DecoderConfig
    names: TensorNames

    def matrices(self) -> Iterator[tuple[str, LazyMatrix]]:
        """Yield every matrix of the graph by name: the embedding, each layer's four, and an untied head."""
        yield "embedding", self.embedding()
        for i in range(len(self.decoder.layers)):
            for part in LAYER_PARTS:
                yield f"layer.{i}.{part}", LazyMatrix.of(self.layer(i, part))
        if not self.decoder.tied:
            yield "head", self.head()

    def shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the name and shape of every matrix, in the same order, without reading any."""
        d = self.decoder
        heads = d.heads * d.padded_head_size
        qkv = heads + 2 * d.kv_heads * d.padded_head_size
        shapes = {
            "qkv": (qkv, d.hidden_size),
            "output": (d.hidden_size, heads),
            "gate_up": (2 * d.mlp_size, d.hidden_size),
            "down": (d.hidden_size, d.mlp_size),
        }
        yield "embedding", (d.vocab_size, d.hidden_size)
        for i in range(len(d.layers)):
            for part in LAYER_PARTS:
                yield f"layer.{i}.{part}", shapes[part]
        if not d.tied:
            yield "head", (d.vocab_size, d.hidden_size)

    def embedding(self) -> LazyMatrix:
        """[vocab, hidden]."""
        return self._table(self.names.embedding)

    def head(self) -> LazyMatrix:
        """[vocab, hidden]."""
        return self._table(self.names.head)

    def layer(self, i: int, part: str) -> Array:
        """Return a layer's matrix: `qkv` [(heads + 2 kv_heads) * size, hidden] with size the padded head size.

        `output` [hidden, heads * size], `gate_up` [2 * mlp, hidden] and `down` [hidden, mlp].
        """
        readers: dict[str, Callable[[int], Array]] = {
            "qkv": self._qkv,
            "output": self._output,
            "gate_up": self._gate_up,
            "down": self._down,
        }
        return readers[part](i)

    def bias(self, i: int, part: str) -> Array | None:
        """Return the bias of a layer's matrix, one number a row, where the decoder has one."""
        d, n = self.decoder, self.names
        if part == "qkv" and d.qkv_bias:
            if n.qkv:
                parts = np.split(self._read(_bias(n.qkv), i, self._qkv_rows()), self._qkv_bounds())
            else:
                rows = (d.heads, d.kv_heads, d.kv_heads)
                names = (n.query, n.key, n.value)
                parts = [self._read(_bias(name), i, r * d.head_size) for name, r in zip(names, rows, strict=True)]
            return np.concatenate([self._pad(part) for part in parts])
        if part == "output" and d.output_bias:
            return self._read(_bias(n.output), i, d.hidden_size) * np.float32(d.residual_scale)
        if part == "gate_up" and d.mlp_bias:
            if n.gate_up:
                return self._read(_bias(n.gate_up), i, 2 * d.mlp_size)
            return np.concatenate([self._read(_bias(name), i, d.mlp_size) for name in (n.gate, n.up)])
        if part == "down" and d.mlp_bias:
            return self._read(_bias(n.down), i, d.hidden_size) * np.float32(d.residual_scale)
        return None

    def importance(self, name: str) -> Array | None:
        """Return what an error in each column of a matrix costs, [columns], as far as the weights alone tell.

        What a norm gives has the mean square of its factors, so those are the second moments of what the matrix
        multiplies. A tied table is also looked up, where every column counts alike: halfway, the square root of it.
        None where no norm comes before.
        """
        d, n = self.decoder, self.names
        part = name.rpartition(".")[2]
        if name == "head":
            return np.square(self.norm(n.final_norm))
        if name == "embedding":
            return np.abs(self.norm(n.final_norm)) if d.tied else None
        norms = {"qkv": n.attention_norm, "gate_up": n.mlp_norm}
        if part not in norms or not d.pre_norm:
            return None
        return np.square(self.norm(norms[part], int(name.split(".")[1])))

    def norm(self, name: str, i: int = 0) -> Array:
        """Return a norm's factors, [hidden]."""
        return self._read(name, i, self.decoder.hidden_size) + np.float32(self.decoder.norm_offset)

    def final_norm(self) -> Array:
        """Return the last norm's factors [hidden], with what scales the logits, and 1 / soft cap where there is one."""
        d = self.decoder
        return self.norm(self.names.final_norm) * np.float32(d.logit_scale / (d.logit_softcap or 1.0))

    def head_norm(self, name: str, i: int, heads: int) -> Array:
        """Return the factors that norm queries or keys: [size] for each head alike, or [heads * size].

        Padding makes the mean square smaller by head size / padded size; these factors make up for it, if epsilon is
        scaled by the same (`norm_epsilon`).
        """
        d = self.decoder
        count = heads if d.qk_norm == "projection" else 1
        factors = self._read(name, i, count * d.head_size) + np.float32(d.norm_offset)
        return self._pad(factors) * np.float32((d.head_size / d.padded_head_size) ** 0.5)

    @property
    def head_norm_epsilon(self) -> float:
        """Epsilon of the norms of queries and keys, in the graph."""
        return self.decoder.norm_epsilon * self.decoder.head_size / self.decoder.padded_head_size

    # --- matrices of a layer ---

    def _qkv(self, i: int) -> Array:
        d, n = self.decoder, self.names
        if n.qkv:
            parts = np.split(self._read(n.qkv, i, self._qkv_rows(), d.hidden_size), self._qkv_bounds())
        else:
            rows = (d.heads, d.kv_heads, d.kv_heads)
            names = (n.query, n.key, n.value)
            parts = [self._read(name, i, r * d.head_size, d.hidden_size) for name, r in zip(names, rows, strict=True)]
        return np.concatenate([self._pad(part) for part in parts])

    def _qkv_rows(self) -> int:
        return (self.decoder.heads + 2 * self.decoder.kv_heads) * self.decoder.head_size

    def _qkv_bounds(self) -> list[int]:
        """Where the keys and the values start."""
        d = self.decoder
        return [d.heads * d.head_size, (d.heads + d.kv_heads) * d.head_size]

    def _output(self, i: int) -> Array:
        d = self.decoder
        weight = self._read(self.names.output, i, d.hidden_size, d.heads * d.head_size) * np.float32(d.residual_scale)
        return np.ascontiguousarray(self._pad(np.ascontiguousarray(weight.T)).T)

    def _gate_up(self, i: int) -> Array:
        d, n = self.decoder, self.names
        if n.gate_up:
            return self._read(n.gate_up, i, 2 * d.mlp_size, d.hidden_size)
        return np.concatenate([self._read(name, i, d.mlp_size, d.hidden_size) for name in (n.gate, n.up)])

    def _down(self, i: int) -> Array:
        d = self.decoder
        return self._read(self.names.down, i, d.hidden_size, d.mlp_size) * np.float32(d.residual_scale)

    # --- reading ---

    def _table(self, name: str) -> LazyMatrix:
        shape = (self.decoder.vocab_size, self.decoder.hidden_size)
        return LazyMatrix(shape, lambda start, stop: self.source.tensor(name, shape, slice(start, stop)))

    def _read(self, name: str, i: int, *shape: int) -> Array:
        return self.source.tensor(name.format(i=i), shape)

    def _pad(self, rows: Array) -> Array:
        """Pad every head with zeros at its end: [heads * size, ...] -> [heads * padded, ...]."""
        d = self.decoder
        extra = d.padded_head_size - d.head_size
        if not extra:
            return rows
        heads = rows.reshape(-1, d.head_size, *rows.shape[1:])
        padded = np.pad(heads, [(0, 0), (0, extra)] + [(0, 0)] * (heads.ndim - 2))
        return padded.reshape(-1, *rows.shape[1:])


def _bias(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "bias"
