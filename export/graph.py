"""The decoder as ONNX nodes, in as few and as large ones as the CPU kernels offer.

Knows the operators of onnxruntime's `com.microsoft` domain (ContribOperators.md) and nothing of checkpoints. Batch B,
sequence S, chosen rows R:

inputs   input_ids int64 [B, S]; seqlens_k int32 [B], total length - 1; total_sequence_length int32 [1];
         rows int64 [R], indices into the flattened [B * S] positions whose logits are wanted;
         past.{i}.key and .value float32 [B, kv_heads, capacity, head_size]
outputs  logits float32 [R, vocab]; present.{i}.key and .value, to be bound to the same memory as past
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from edgelm.bundle import Matrix

from .initializers import Initializers
from .quantize.pack import quantize
from .quantize.plan import ACCURACY_LEVEL, Plan
from .weights import Weights

MICROSOFT: Final = "com.microsoft"
OPSET: Final = 18
IR_VERSION: Final = 10
"""Old enough for onnxruntime 1.23, the newest on Python 3.10."""

Array = NDArray[np.float32]


class GraphBuilder:
    """Writes one decoder. Call `build` once."""

    def __init__(
        self,
        weights: Weights,
        plan: Plan,
        context: int,
        initializers: Initializers,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._progress = progress or (lambda _what, _done, _of: None)
        self._weights = weights
        self._decoder = weights.decoder
        self._plan = plan
        self._context = context
        self._initializers = initializers
        self._nodes: list[NodeProto] = []
        self.matrices: list[Matrix] = []

    def build(self) -> ModelProto:
        """Return the model; its large tensors are in the initializers' data file."""
        names, last = self._weights.names, self._decoder.layers - 1
        cosines, sines = self._weights.rotary_tables(self._context)
        self._initializers.add("cos_cache", cosines)
        self._initializers.add("sin_cache", sines)
        residual = self._embed()
        normed = self._node(
            "SimplifiedLayerNormalization",
            [residual, self._gamma("norm.0.attention", names.attention_norm, 0)],
            "layer.0.normed",
            epsilon=self._decoder.norm_epsilon,
            axis=-1,
            stash_type=1,
        )
        for i in range(self._decoder.layers):
            self._progress("layer", i, self._decoder.layers)
            attention = self._attend(i, normed)
            if i == last:  # from here on only the chosen rows matter
                attention = self._choose(attention, "attention", self._decoder.heads * self._decoder.padded_head_size)
                residual = self._choose(residual, "residual", self._decoder.hidden_size)
            normed, residual = self._add_norm(
                f"layer.{i}.mlp", residual, attention, self._gamma(f"norm.{i}.mlp", names.mlp_norm, i), output=i
            )
            mlp = self._mlp(i, normed)
            following = (
                self._gamma("norm.final", names.final_norm, 0)
                if i == last
                else self._gamma(f"norm.{i + 1}.attention", names.attention_norm, i + 1)
            )
            normed, residual = self._add_norm(f"layer.{i + 1}", residual, mlp, following, final=i == last)
        self._head(normed)
        return self._model()

    # --- parts of the decoder ---

    def _embed(self) -> str:
        weight = self._weights.embedding()
        rows, columns = weight.shape
        if self._plan.bits == 32:
            self._initializers.add("embedding", weight)
            self._record("embedding", weight)
            return self._node("Gather", ["embedding", "input_ids"], "embedded", axis=0)
        data, scales = self._quantized("embedding", weight)
        blocks = -(-columns // self._plan.block_size)
        width = blocks * self._plan.block_size
        flat = self._initializers.alias(
            "embedding.rows", data, (rows, width * self._plan.bits // 8), keep=self._decoder.tied
        )
        embedded = self._node(
            "GatherBlockQuantized",
            [flat, "input_ids", scales],
            "embedded" if width == columns else "embedded.padded",
            domain=MICROSOFT,
            bits=self._plan.bits,
            block_size=self._plan.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if width == columns:
            return embedded
        bounds = [
            self._constant(f"embedded.{name}", [value]) for name, value in (("from", 0), ("to", columns), ("axis", 2))
        ]
        return self._node("Slice", [embedded, *bounds], "embedded")

    def _attend(self, i: int, normed: str) -> str:
        d = self._decoder
        packed = self._linear(f"layer.{i}.qkv", normed, *self._weights.query_key_value(i))
        outputs = [f"layer.{i}.attention", f"present.{i}.key", f"present.{i}.value"]
        caches = [f"past.{i}.key", f"past.{i}.value"]
        inputs = [packed, "", "", *caches, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"]
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                inputs,
                outputs,
                name=f"layer.{i}.attention",
                domain=MICROSOFT,
                num_heads=d.heads,
                kv_num_heads=d.kv_heads,
                scale=d.head_size**-0.5,
                do_rotary=1,
                rotary_interleaved=0,
            )
        )
        return outputs[0]

    def _add_norm(
        self, name: str, residual: str, branch: str, gamma: str, *, output: int | None = None, final: bool = False
    ) -> tuple[str, str]:
        """Add a branch to the residual stream; return (normed, new residual). `output` projects attention first."""
        if output is not None:
            branch = self._linear(f"layer.{output}.output", branch, *self._weights.output(output))
        outputs = [f"{name}.normed"] if final else [f"{name}.normed", "", "", f"{name}.residual"]
        self._nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [residual, branch, gamma],
                outputs,
                name=f"{name}.norm",
                domain=MICROSOFT,
                epsilon=self._decoder.norm_epsilon,
            )
        )
        return outputs[0], f"{name}.residual"

    def _mlp(self, i: int, normed: str) -> str:
        packed = self._linear(f"layer.{i}.gate_up", normed, *self._weights.gate_up(i))
        gate, up = f"layer.{i}.gate", f"layer.{i}.up"
        self._nodes.append(
            helper.make_node("Split", [packed], [gate, up], name=f"layer.{i}.split", axis=-1, num_outputs=2)
        )
        # QuickGelu with alpha 1 is x * sigmoid(x), SiLU, as one node.
        silu = self._node("QuickGelu", [gate], f"layer.{i}.silu", domain=MICROSOFT, alpha=1.0)
        gated = self._node("Mul", [silu, up], f"layer.{i}.gated")
        return self._linear(f"layer.{i}.down", gated, *self._weights.down(i))

    def _choose(self, value: str, name: str, width: int) -> str:
        """[B, S, width] -> the chosen rows [R, width]."""
        flat = self._node("Reshape", [value, self._constant(f"{name}.shape", [-1, width])], f"{name}.flat")
        return self._node("Gather", [flat, "rows"], f"{name}.chosen", axis=0)

    def _head(self, normed: str) -> None:
        tied = self._decoder.tied
        weight = None if tied else self._weights.head()
        if self._plan.bits == 32:
            name = "embedding"
            if weight is not None:
                name = self._initializers.add("head", weight)
                self._record("head", weight)
            self._node("Gemm", [normed, name], "logits", transB=1)
            return
        if weight is None:
            self._matmul_nbits(normed, "embedding", self._decoder.vocab_size, self._decoder.hidden_size, None, "logits")
        else:
            self._quantized("head", weight)
            rows, columns = weight.shape
            self._matmul_nbits(normed, "head", rows, columns, None, "logits")

    # --- matrices ---

    def _linear(self, name: str, value: str, weight: Array, bias: Array | None) -> str:
        rows, columns = weight.shape
        bias_name = None if bias is None else self._initializers.add(f"{name}.bias", bias)
        if self._plan.bits == 32:
            self._initializers.add(f"{name}.weight", np.ascontiguousarray(weight.T))
            self._record(name, weight)
            if bias_name is None:
                return self._node("MatMul", [value, f"{name}.weight"], f"{name}.out")
            product = self._node("MatMul", [value, f"{name}.weight"], f"{name}.product")
            return self._node("Add", [product, bias_name], f"{name}.out")
        self._quantized(name, weight)
        return self._matmul_nbits(value, name, rows, columns, bias_name, f"{name}.out")

    def _matmul_nbits(self, value: str, name: str, rows: int, columns: int, bias: str | None, output: str) -> str:
        return self._node(
            "MatMulNBits",
            [value, f"{name}.codes", f"{name}.scales", *(["", "", bias] if bias else [])],
            output,
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=self._plan.bits,
            block_size=self._plan.block_size,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _quantized(self, name: str, weight: Array) -> tuple[str, str]:
        packed = quantize(weight, self._plan.bits, self._plan.block_size, self._plan.method)
        self._record(name, weight)
        return (
            self._initializers.add(f"{name}.codes", packed.data),
            self._initializers.add(f"{name}.scales", packed.scales),
        )

    def _record(self, name: str, weight: Array) -> None:
        rows, columns = weight.shape
        plan = self._plan
        if plan.bits == 32:
            self.matrices.append(Matrix(name, rows, columns, 32))
        else:
            self.matrices.append(
                Matrix(name, rows, columns, plan.bits, plan.block_size, True, ACCURACY_LEVEL, plan.method)
            )

    # --- plumbing ---

    def _gamma(self, name: str, source: str, layer: int) -> str:
        return self._initializers.add(name, self._weights.norm(source, layer))

    def _constant(self, name: str, values: list[int]) -> str:
        return self._initializers.add(name, np.asarray(values, np.int64))

    def _node(self, operator: str, inputs: list[str], output: str, *, domain: str = "", **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes))
        return output

    def _model(self) -> ModelProto:
        d = self._decoder
        cache: list[str | int | None] = ["batch", d.kv_heads, "capacity", d.padded_head_size]
        value = helper.make_tensor_value_info
        inputs = [
            value("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            value("seqlens_k", TensorProto.INT32, ["batch"]),
            value("total_sequence_length", TensorProto.INT32, [1]),
            value("rows", TensorProto.INT64, ["rows"]),
        ]
        outputs = [value("logits", TensorProto.FLOAT, ["rows", d.vocab_size])]
        for i in range(d.layers):
            for part in ("key", "value"):
                inputs.append(value(f"past.{i}.{part}", TensorProto.FLOAT, cache))
                outputs.append(value(f"present.{i}.{part}", TensorProto.FLOAT, cache))
        graph: GraphProto = helper.make_graph(
            self._nodes, "decoder", inputs, outputs, list(self._initializers.tensors.values())
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model: ModelProto = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgelm"
        )
        return model
