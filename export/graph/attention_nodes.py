"""Attention as ONNX nodes: packed projections go into one operator that rotates, caches, masks and attends."""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, ValueInfoProto, helper

from ..architectures.decoder import DecoderConfig
from ..architectures.rope import RopeConfig
from ..architectures.weights import DecoderWeights
from .nodes import MICROSOFT_DOMAIN, GraphBuilder


def needs_positions(decoder: DecoderConfig, context: int) -> bool:
    """Return whether the graph has the input `positions`: the kernel does not rotate, or the rotary tables change."""
    return bool(decoder.ropes) and (not decoder.has_fused_rotary or decoder.long_from(context) is not None)


class AttentionBuilder:
    """Adds the attention of each layer. Rotary tables are stored when the first layer needs them."""

    def __init__(self, weights: DecoderWeights, context: int, nodes: GraphBuilder) -> None:
        self._weights = weights
        self._decoder = weights.decoder
        self._context = context
        self._nodes = nodes

    def add_layer(self, i: int, packed: str) -> str:
        """Add the attention of layer `i`: packed [B, S, (heads + 2 kv_heads) * size] -> [B, S, heads * size]."""
        d, layer, name = self._decoder, self._decoder.layers[i], f"layer.{i}"
        rope, inside = layer.rope, self._decoder.has_fused_rotary
        if d.qk_norm is None and (rope is None or inside):
            projections = [packed, "", ""]
        else:
            projections = self._split(i, packed)
            if rope is not None and not inside:
                projections = self._rotate(i, projections, rope)
        rotary = ["", ""] if rope is None or not inside else list(self._tables(rope))
        inputs = [
            *projections,
            f"past.{i}.key",
            f"past.{i}.value",
            "seqlens_k",
            "total_sequence_length",
            *rotary,
            "positions" if rotary[0] and needs_positions(d, self._context) else "",
        ]
        while not inputs[-1]:
            inputs.pop()
        options: dict[str, Any] = {"do_rotary": int(bool(rotary[0])), "rotary_interleaved": 0}
        if layer.window is not None:
            options["local_window_size"] = layer.window
        if d.attention_softcap is not None:
            options["softcap"] = d.attention_softcap
        outputs = [f"{name}.attention.out", f"present.{i}.key", f"present.{i}.value"]
        return self._nodes.add_node_with_outputs(
            "GroupQueryAttention",
            inputs,
            outputs,
            domain=MICROSOFT_DOMAIN,
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            scale=d.attention_scale,
            **options,
        )[0]

    def cache_values(self, i: int) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
        """Return the graph inputs (past) and outputs (present) of a layer's KV cache."""
        d = self._decoder
        shape: list[str | int | None] = ["batch", d.kv_heads, "capacity", d.padded_head_size]
        value = helper.make_tensor_value_info
        past, present = (
            [value(f"{when}.{i}.{part}", TensorProto.FLOAT, shape) for part in ("key", "value")]
            for when in ("past", "present")
        )
        return past, present

    def _split(self, i: int, packed: str) -> list[str]:
        """Split packed projections into query, key and value; norm query and key if the decoder does."""
        d, nodes, name = self._decoder, self._nodes, f"layer.{i}"
        sizes = [heads * d.padded_head_size for heads in (d.heads, d.kv_heads, d.kv_heads)]
        parts = [f"{name}.{part}" for part in ("query", "key", "value")]
        query, key, value = nodes.add_node_with_outputs(
            "Split", [packed, nodes.int64_constant("qkv.sizes", sizes)], parts, axis=-1
        )
        if d.qk_norm is None:
            return [query, key, value]
        names = self._weights.tensor_names
        return [
            self._norm(i, query, names.query_norm, d.heads),
            self._norm(i, key, names.key_norm, d.kv_heads),
            value,
        ]

    def _norm(self, i: int, value: str, norm: str, heads: int) -> str:
        d, nodes = self._decoder, self._nodes
        factors = nodes.constants.add(f"{value}.norm", self._weights.head_norm(norm, i, heads))
        epsilon = self._weights.head_norm_epsilon
        if d.qk_norm == "projection":
            return nodes.rms_norm(value, factors, f"{value}.normed", epsilon)
        split = nodes.int64_constant(f"heads.{heads}", [0, 0, heads, d.padded_head_size])
        joined = nodes.int64_constant(f"heads.{heads}.joined", [0, 0, heads * d.padded_head_size])
        by_head = nodes.add_node("Reshape", [value, split], f"{value}.heads")
        normed = nodes.rms_norm(by_head, factors, f"{value}.heads.normed", epsilon)
        return nodes.add_node("Reshape", [normed, joined], f"{value}.normed")

    def _rotate(self, i: int, projections: list[str], rope: RopeConfig) -> list[str]:
        """Rotate queries and keys in nodes before the attention operator."""
        d = self._decoder
        tables = self._tables(rope)
        rotated = []
        for part, heads, value in zip(("query", "key"), (d.heads, d.kv_heads), projections[:2], strict=True):
            inputs = [value, "positions", *tables]
            rotated.append(
                self._nodes.add_node(
                    "RotaryEmbedding",
                    inputs,
                    f"layer.{i}.{part}.rotated",
                    domain=MICROSOFT_DOMAIN,
                    interleaved=0,
                    num_heads=heads,
                    rotary_embedding_dim=d.rotary_size,
                )
            )
        return [*rotated, projections[2]]

    def _tables(self, rope: RopeConfig) -> tuple[str, str]:
        d = self._decoder
        suffix = f".{d.ropes.index(rope)}" if len(d.ropes) > 1 else ""
        names = f"cos_cache{suffix}", f"sin_cache{suffix}"
        if names[0] not in self._nodes.constants.tensors:
            for name, table in zip(names, rope.tables(self._context, d.rotary_size), strict=True):
                self._nodes.constants.add(name, table)
        return names
