"""The decoder as ONNX nodes, few and large ones as far as the CPU kernels allow.

Knows the operators of onnxruntime's `com.microsoft` domain (ContribOperators.md), not checkpoints. Batch B, sequence S,
selected rows R:

inputs   input_ids int64 [B, S]; seqlens_k int32 [B], total length - 1; total_sequence_length int32 [1];
         rows int64 [R], indices into the flattened [B * S] positions whose logits are computed;
         positions int64 [B, S], rows of the rotary tables, only if the attention kernel cannot derive them;
         past.{i}.key and .value float32 [B, kv_heads, capacity, head_size]
outputs  logits float32 [R, vocab]; present.{i}.key and .value, to be bound to the same memory as past
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from edgelm.bundle.manifest import Matrix

from ..architectures.decoder import Activation
from ..architectures.weights import DecoderWeights
from .attention_nodes import AttentionBuilder, needs_positions
from .matrices import add_lookup, add_matmul, add_table_matmul
from .nodes import MICROSOFT_DOMAIN, GraphBuilder

ACTIVATIONS: Final[dict[Activation, tuple[str, str, dict[str, float]]]] = {
    # QuickGelu with alpha 1 is x * sigmoid(x), that is SiLU, in one node.
    "silu": ("QuickGelu", MICROSOFT_DOMAIN, {"alpha": 1.0}),
    "gelu": ("Gelu", MICROSOFT_DOMAIN, {}),
    "gelu_tanh": ("FastGelu", MICROSOFT_DOMAIN, {}),
    "relu": ("Relu", "", {}),
}


class DecoderGraphBuilder:
    """Adds the nodes of one decoder whose matrices are already stored. Call `build` or `build_part` once."""

    def __init__(
        self, weights: DecoderWeights, matrices: Mapping[str, Matrix], context: int, nodes: GraphBuilder
    ) -> None:
        self._weights = weights
        self._decoder = weights.decoder
        self._matrices = matrices
        self._nodes = nodes
        self._attention = AttentionBuilder(weights, context, nodes)
        self._context = context

    def build(self) -> ModelProto:
        """Return the whole model, from token ids to logits."""
        d, last = self._decoder, len(self._decoder.layers) - 1
        residual, branch = self._embed(), ""
        for i in range(len(d.layers)):
            residual, branch = self._layer(i, residual, branch, selects_rows=i == last)
        factors = self._nodes.constants.add("norm.final", self._weights.final_norm())
        normed, _ = self._norm("final", residual, branch, factors)
        self._head(normed)
        outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", d.vocab_size])]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            *self._lengths(),
        ]
        inputs.append(helper.make_tensor_value_info("rows", TensorProto.INT64, ["rows"]))
        for i in range(len(d.layers)):
            past, present = self._attention.cache_values(i)
            inputs += past
            outputs += present
        return self._nodes.build_model("decoder", inputs, outputs)

    def build_part(self, i: int, part: str) -> ModelProto:
        """Return the part of layer `i` from the input of one matrix to the input of the next.

        `start` has the input `residual` [B, S, hidden]; the others have `value` [B, S, K], the input of the matrix they
        are named after, and `output` and `down` also `residual`. The output `next` is the input of the next matrix (not
        for `down`); `output` and `down` also return `after`, the residual stream. `qkv` also has the graph's inputs
        above except input_ids and rows, and the layer's past and present.
        """
        d, names, layer = self._decoder, self._weights.tensor_names, f"layer.{i}"
        after: str | None = None
        following: str | None = None
        if part == "start":
            following, _ = self._add_branch_and_norm(f"{layer}.attention", "residual", "", names.attention_norm, i)
        elif part == "qkv":
            following = self._attention.add_layer(i, self._linear(i, part, "value"))
        elif part == "output":
            branch = self._post_norm(
                f"{layer}.attention.post", self._linear(i, part, "value"), names.attention_post_norm, i
            )
            following, after = self._add_branch_and_norm(f"{layer}.mlp", "residual", branch, names.mlp_norm, i)
        elif part == "gate_up":
            following = self._gated(i, "value")
        else:
            branch = self._post_norm(f"{layer}.mlp.post", self._linear(i, part, "value"), names.mlp_post_norm, i)
            after = self._nodes.add_node("Add", ["residual", branch], "sum")
        value = helper.make_tensor_value_info
        widths = {"qkv": d.hidden_size, "output": d.heads * d.padded_head_size, "gate_up": d.hidden_size}
        inputs, outputs = [], []
        if part != "start":
            inputs.append(value("value", TensorProto.FLOAT, ["batch", "sequence", widths.get(part, d.mlp_size)]))
        if part in ("start", "output", "down"):
            inputs.append(value("residual", TensorProto.FLOAT, ["batch", "sequence", d.hidden_size]))
        for name, made in (("next", following), ("after", after)):
            if made is not None:
                outputs.append(value(self._nodes.add_node("Identity", [made], name), TensorProto.FLOAT, None))
        if part == "qkv":
            past, present = self._attention.cache_values(i)
            inputs += [*self._lengths(), *past]
            outputs += present
        return self._nodes.build_model(part, inputs, outputs)

    # --- parts of the decoder ---

    def _embed(self) -> str:
        scaled = self._decoder.embedding_scale != 1.0
        embedded = add_lookup(self._nodes, self._matrices["embedding"], "input_ids", "embedded")
        if not scaled:
            return embedded
        return self._nodes.add_node(
            "Mul", [embedded, self._nodes.float_constant("embedding.scale", self._decoder.embedding_scale)], "hidden"
        )

    def _layer(self, i: int, residual: str, branch: str, *, selects_rows: bool) -> tuple[str, str]:
        """Add a layer; return the residual stream and a branch that is not yet added to it.

        With `selects_rows` only the selected rows are computed after attention.
        """
        names, d, layer = self._weights.tensor_names, self._decoder, f"layer.{i}"
        normed, residual = self._add_branch_and_norm(f"{layer}.attention", residual, branch, names.attention_norm, i)
        packed = self._linear(i, "qkv", normed)
        branch = self._attention.add_layer(i, packed)
        if selects_rows:
            branch = self._select_rows(branch, "attention", d.heads * d.padded_head_size)
            residual = self._select_rows(residual, "residual", d.hidden_size)
        branch = self._linear(i, "output", branch)
        branch = self._post_norm(f"{layer}.attention.post", branch, names.attention_post_norm, i)
        normed, residual = self._add_branch_and_norm(f"{layer}.mlp", residual, branch, names.mlp_norm, i)
        branch = self._linear(i, "down", self._gated(i, normed))
        return residual, self._post_norm(f"{layer}.mlp.post", branch, names.mlp_post_norm, i)

    def _gated(self, i: int, normed: str) -> str:
        packed = self._linear(i, "gate_up", normed)
        parts = [f"layer.{i}.gate", f"layer.{i}.up"]
        gate, up = self._nodes.add_node_with_outputs("Split", [packed], parts, axis=-1, num_outputs=2)
        operator, domain, attributes = ACTIVATIONS[self._decoder.activation]
        active = self._nodes.add_node(operator, [gate], f"layer.{i}.active", domain=domain, **attributes)
        return self._nodes.add_node("Mul", [active, up], f"layer.{i}.gated")

    def _head(self, normed: str) -> None:
        matrix, cap = (
            self._matrices["embedding" if self._decoder.has_tied_head else "head"],
            self._decoder.logit_softcap,
        )
        if cap is None:
            add_table_matmul(self._nodes, matrix, normed, "logits")
            return
        bounded = self._nodes.add_node(
            "Tanh", [add_table_matmul(self._nodes, matrix, normed, "head.out")], "head.bounded"
        )
        self._nodes.add_node("Mul", [bounded, self._nodes.float_constant("head.cap", cap)], "logits")

    # --- the residual stream ---

    def _add_branch_and_norm(self, name: str, residual: str, branch: str, norm: str, i: int) -> tuple[str, str]:
        """Add the pending branch to the residual stream and norm it if the decoder has pre-norms."""
        if self._decoder.pre_norm:
            return self._norm(name, residual, branch, self._factors(f"norm.{name}", norm, i))
        if branch:
            residual = self._nodes.add_node("Add", [residual, branch], f"{name}.residual")
        return residual, residual

    def _norm(self, name: str, residual: str, branch: str, factors: str) -> tuple[str, str]:
        """Return (normed, residual + branch). An empty name as `branch` adds nothing."""
        epsilon = self._decoder.norm_epsilon
        if not branch:
            return self._nodes.rms_norm(residual, factors, f"{name}.normed", epsilon), residual
        outputs = [f"{name}.normed", "", "", f"{name}.residual"]
        made = self._nodes.add_node_with_outputs(
            "SkipSimplifiedLayerNormalization",
            [residual, branch, factors],
            outputs,
            domain=MICROSOFT_DOMAIN,
            epsilon=epsilon,
        )
        return made[0], made[3]

    def _post_norm(self, name: str, branch: str, norm: str, i: int) -> str:
        if not self._decoder.post_norm:
            return branch
        factors = self._factors(f"norm.{name}", norm, i)
        return self._nodes.rms_norm(branch, factors, f"{name}.normed", self._decoder.norm_epsilon)

    def _factors(self, name: str, norm: str, i: int) -> str:
        return self._nodes.constants.add(name, self._weights.norm(norm, i))

    def _linear(self, i: int, part: str, value: str) -> str:
        name = f"layer.{i}.{part}"
        bias = self._weights.bias(i, part)
        bias_name = None if bias is None else self._nodes.constants.add(f"{name}.bias", bias)
        return add_matmul(self._nodes, self._matrices[name], value, bias_name, f"{name}.out")

    def _select_rows(self, value: str, name: str, width: int) -> str:
        """Select rows: [B, S, width] -> [R, width]."""
        flat = self._nodes.add_node(
            "Reshape", [value, self._nodes.int64_constant(f"{name}.shape", [-1, width])], f"{name}.flat"
        )
        return self._nodes.add_node("Gather", [flat, "rows"], f"{name}.chosen", axis=0)

    def _lengths(self) -> list[ValueInfoProto]:
        value = helper.make_tensor_value_info
        inputs = [
            value("seqlens_k", TensorProto.INT32, ["batch"]),
            value("total_sequence_length", TensorProto.INT32, [1]),
        ]
        if needs_positions(self._decoder, self._context):
            inputs.append(value("positions", TensorProto.INT64, ["batch", "sequence"]))
        return inputs
