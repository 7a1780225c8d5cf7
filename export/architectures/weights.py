"""The decoder's weights in the form that the graph stores: projections packed, heads padded, scales multiplied in.

A head whose size the attention kernel does not accept is padded with zeros at its end, which changes no result. The
tensors of one layer are in memory at a time; embedding and head are read in chunks.
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
"""Matrices of a layer, in the order of computation."""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """Reads a checkpoint's tensors for a decoder. Every method raises `CheckpointError` for a bad tensor."""

    source: TensorSource
    decoder: DecoderConfig
    tensor_names: TensorNames

    def matrices(self) -> Iterator[tuple[str, LazyMatrix]]:
        """Yield every matrix of the graph by name: the embedding, each layer's four, and an untied head."""
        yield "embedding", self.embedding()
        for i in range(len(self.decoder.layers)):
            for part in LAYER_PARTS:
                yield f"layer.{i}.{part}", LazyMatrix.from_array(self.layer(i, part))
        if not self.decoder.has_tied_head:
            yield "head", self.head()

    def matrix_shapes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the name and shape of every matrix in the order of `matrices`, without reading any."""
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
        if not d.has_tied_head:
            yield "head", (d.vocab_size, d.hidden_size)

    def embedding(self) -> LazyMatrix:
        """[vocab, hidden]."""
        return self._table(self.tensor_names.embedding)

    def head(self) -> LazyMatrix:
        """[vocab, hidden]."""
        return self._table(self.tensor_names.head)

    def layer(self, i: int, part: str) -> Array:
        """Return a matrix of a layer, float32.

        `qkv` [(heads + 2 kv_heads) * size, hidden] with size = padded head size, `output` [hidden, heads * size],
        `gate_up` [2 * mlp, hidden], `down` [hidden, mlp].
        """
        readers: dict[str, Callable[[int], Array]] = {
            "qkv": self._qkv,
            "output": self._output,
            "gate_up": self._gate_up,
            "down": self._down,
        }
        return readers[part](i)

    def bias(self, i: int, part: str) -> Array | None:
        """Return the bias of a layer's matrix, float32 [rows]; None if the decoder has none."""
        d, n = self.decoder, self.tensor_names
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
        """Return the importance of a matrix's columns, float32 [columns], estimated from the weights alone.

        The mean square of a norm's output is the square of its factors, so these are the second moments of the inputs.
        A tied embedding is also used for lookup, where all columns count alike; the compromise is the square root. None
        if no norm precedes the matrix.
        """
        d, n = self.decoder, self.tensor_names
        part = name.rpartition(".")[2]
        if name == "head":
            return np.square(self.norm(n.final_norm))
        if name == "embedding":
            return np.abs(self.norm(n.final_norm)) if d.has_tied_head else None
        norms = {"qkv": n.attention_norm, "gate_up": n.mlp_norm}
        if part not in norms or not d.pre_norm:
            return None
        return np.square(self.norm(norms[part], int(name.split(".")[1])))

    def norm(self, name: str, i: int = 0) -> Array:
        """Return the factors of a norm, float32 [hidden]."""
        return self._read(name, i, self.decoder.hidden_size) + np.float32(self.decoder.norm_offset)

    def final_norm(self) -> Array:
        """Return the factors of the last norm [hidden], multiplied by the logit scale and 1 / soft cap."""
        d = self.decoder
        return self.norm(self.tensor_names.final_norm) * np.float32(d.logit_scale / (d.logit_softcap or 1.0))

    def head_norm(self, name: str, i: int, heads: int) -> Array:
        """Return the factors that norm queries or keys: [size], the same for each head, or [heads * size].

        Padding reduces the mean square by head size / padded size. These factors compensate for that, if epsilon is
        scaled by the same ratio (`head_norm_epsilon`).
        """
        d = self.decoder
        count = heads if d.qk_norm == "projection" else 1
        factors = self._read(name, i, count * d.head_size) + np.float32(d.norm_offset)
        return self._pad(factors) * np.float32((d.head_size / d.padded_head_size) ** 0.5)

    @property
    def head_norm_epsilon(self) -> float:
        """Epsilon of the query and key norms in the graph."""
        return self.decoder.norm_epsilon * self.decoder.head_size / self.decoder.padded_head_size

    # --- matrices of a layer ---

    def _qkv(self, i: int) -> Array:
        d, n = self.decoder, self.tensor_names
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
        """Return the rows where keys and values start."""
        d = self.decoder
        return [d.heads * d.head_size, (d.heads + d.kv_heads) * d.head_size]

    def _output(self, i: int) -> Array:
        d = self.decoder
        weight = self._read(self.tensor_names.output, i, d.hidden_size, d.heads * d.head_size) * np.float32(
            d.residual_scale
        )
        return np.ascontiguousarray(self._pad(np.ascontiguousarray(weight.T)).T)

    def _gate_up(self, i: int) -> Array:
        d, n = self.decoder, self.tensor_names
        if n.gate_up:
            return self._read(n.gate_up, i, 2 * d.mlp_size, d.hidden_size)
        return np.concatenate([self._read(name, i, d.mlp_size, d.hidden_size) for name in (n.gate, n.up)])

    def _down(self, i: int) -> Array:
        d = self.decoder
        return self._read(self.tensor_names.down, i, d.hidden_size, d.mlp_size) * np.float32(d.residual_scale)

    # --- reading ---

    def _table(self, name: str) -> LazyMatrix:
        shape = (self.decoder.vocab_size, self.decoder.hidden_size)
        return LazyMatrix(shape, lambda start, stop: self.source.tensor(name, shape, slice(start, stop)))

    def _read(self, name: str, i: int, *shape: int) -> Array:
        return self.source.tensor(name.format(i=i), shape)

    def _pad(self, rows: Array) -> Array:
        """Pad each head with zeros at its end: [heads * size, ...] -> [heads * padded, ...]."""
        d = self.decoder
        extra = d.padded_head_size - d.head_size
        if not extra:
            return rows
        heads = rows.reshape(-1, d.head_size, *rows.shape[1:])
        padded = np.pad(heads, [(0, 0), (0, extra)] + [(0, 0)] * (heads.ndim - 2))
        return padded.reshape(-1, *rows.shape[1:])


def _bias(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "bias"
