"""The decoder's weights in the order and shape that the graph wants: projections packed, heads padded.

A head whose size is no multiple of 16 is padded with zeros, each rotary half by itself, so that the attention kernel
can rotate it and the result stays exact. One layer's tensors are in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Checkpoint
from .decoder import Decoder, Names

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Weights:
    """Reads a checkpoint's tensors for a decoder. Every method raises `CheckpointError` for a bad tensor."""

    checkpoint: Checkpoint
    decoder: Decoder
    names: Names

    def embedding(self) -> Array:
        """[vocab, hidden]."""
        return self._read(self.names.embedding, self.decoder.vocab_size, self.decoder.hidden_size)

    def head(self) -> Array:
        """[vocab, hidden]."""
        return self._read(self.names.head, self.decoder.vocab_size, self.decoder.hidden_size)

    def norm(self, name: str, layer: int = 0) -> Array:
        """[hidden]."""
        return self._read(name.format(i=layer), self.decoder.hidden_size)

    def query_key_value(self, layer: int) -> tuple[Array, Array | None]:
        """Packed rows [(heads + 2 kv_heads) * padded head size, hidden], and the bias."""
        d = self.decoder
        query, key, value = (name.format(i=layer) for name in (self.names.query, self.names.key, self.names.value))
        q = self._read(query, d.heads * d.head_size, d.hidden_size)
        k = self._read(key, d.kv_heads * d.head_size, d.hidden_size)
        v = self._read(value, d.kv_heads * d.head_size, d.hidden_size)
        packed = np.concatenate([self._pad_rotary(q), self._pad_rotary(k), self._pad_rows(v)])
        if not d.qkv_bias:
            return packed, None
        q_bias = self._read(_bias(query), d.heads * d.head_size)
        k_bias = self._read(_bias(key), d.kv_heads * d.head_size)
        v_bias = self._read(_bias(value), d.kv_heads * d.head_size)
        return packed, np.concatenate([self._pad_rotary(q_bias), self._pad_rotary(k_bias), self._pad_rows(v_bias)])

    def output(self, layer: int) -> tuple[Array, Array | None]:
        """[hidden, heads * padded head size], and the bias."""
        d, name = self.decoder, self.names.output.format(i=layer)
        weight = self._read(name, d.hidden_size, d.heads * d.head_size)
        padded = np.ascontiguousarray(self._pad_rows(np.ascontiguousarray(weight.T)).T)
        return padded, self._read(_bias(name), d.hidden_size) if d.output_bias else None

    def gate_up(self, layer: int) -> tuple[Array, Array | None]:
        """Gate rows, then up rows: [2 * mlp, hidden], and the bias."""
        d = self.decoder
        names = [self.names.gate.format(i=layer), self.names.up.format(i=layer)]
        weight = np.concatenate([self._read(name, d.mlp_size, d.hidden_size) for name in names])
        bias = np.concatenate([self._read(_bias(name), d.mlp_size) for name in names]) if d.mlp_bias else None
        return weight, bias

    def down(self, layer: int) -> tuple[Array, Array | None]:
        """[hidden, mlp], and the bias."""
        d, name = self.decoder, self.names.down.format(i=layer)
        weight = self._read(name, d.hidden_size, d.mlp_size)
        return weight, self._read(_bias(name), d.hidden_size) if d.mlp_bias else None

    def rotary_tables(self, context: int) -> tuple[Array, Array]:
        """Cosines and sines [context, padded head size / 2]; the padding's angles are zero."""
        d = self.decoder
        extra = ((0, 0), (0, (d.padded_head_size - d.head_size) // 2))
        cosines, sines = d.rope.tables(context, d.head_size)
        return np.pad(cosines, extra, constant_values=1.0), np.pad(sines, extra)

    def _read(self, name: str, *shape: int) -> Array:
        return self.checkpoint.tensor(name, shape)

    def _pad_rotary(self, rows: Array) -> Array:
        """Pad both rotary halves of every head: [heads * size, ...] -> [heads * padded, ...]."""
        d = self.decoder
        halves = rows.reshape(-1, d.head_size // 2, *rows.shape[1:])
        return self._pad(halves, (d.padded_head_size - d.head_size) // 2)

    def _pad_rows(self, rows: Array) -> Array:
        """Pad every head at its end: [heads * size, ...] -> [heads * padded, ...]."""
        d = self.decoder
        heads = rows.reshape(-1, d.head_size, *rows.shape[1:])
        return self._pad(heads, d.padded_head_size - d.head_size)

    @staticmethod
    def _pad(groups: Array, extra: int) -> Array:
        padded = np.pad(groups, [(0, 0), (0, extra)] + [(0, 0)] * (groups.ndim - 2))
        return padded.reshape(-1, *groups.shape[2:])


def _bias(weight_name: str) -> str:
    return weight_name.removesuffix("weight") + "bias"
