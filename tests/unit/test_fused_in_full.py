"""Every shipped family runs on our kernels in full: the nodes of its rewritten graph are counted.

The exporter and the rewrite agree on operators, attributes and the order of inputs. If a change on either side loses a
fusion, the graph still computes the same numbers, only slower, so no other test fails.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import onnx
from edgelm_export.architectures import load_architectures
from family_checkpoints import BASE, write_checkpoint
from onnx import helper, numpy_helper, parser

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.graph.domain import DOMAIN
from edgelm.graph.onnx_model import read_model
from edgelm.kernels.abi import ATTENTION, NO_OFFSET, is_operator
from edgelm.kernels.rewrite.graph_rewriter import GRAPH, rewrite_graph

LAYERS = BASE["num_hidden_layers"]

# Nodes that remain onnxruntime's, each with its reason.
SELECT_ROWS = Counter({"Reshape": 2, "Gather": 2})
"""Once a graph: the rows whose logits are wanted are selected from the attention output and the residual stream."""
EMBEDDING_SCALE = Counter({"Mul": 1})
"""Once a graph: the embedding is multiplied by a number."""
LOGIT_SOFTCAP = Counter({"Tanh": 1, "Mul": 1})
"""Once a graph: the logits are bounded."""
POST_NORMS = Counter({"SimplifiedLayerNormalization": 2})
"""Each layer: the kernels have no norm after a product."""
NORMS_OF_SUMS = Counter({"SkipSimplifiedLayerNormalization": 2})
"""Each layer: a norm stands between the product and the addition, so the product cannot add."""
HEAD_NORMS = Counter({"Split": 1, "Reshape": 4, "SimplifiedLayerNormalization": 2})
"""Each layer: queries and keys are normed head by head before attention."""
PROJECTION_NORMS = Counter({"Split": 1, "SimplifiedLayerNormalization": 2})
"""Each layer: queries and keys are normed as a whole before attention."""
GELU = Counter({"Split": 1, "FastGelu": 1, "Mul": 1})
"""Each layer: SiLU is the only gated activation that the kernels have."""

LAYER = ["norm", "skip", "norm", "gated skip"]
"""What is fused into the four products of a layer: qkv, output, gate and up, down."""
GELU_LAYER = ["norm", "skip", "norm", "skip"]
GEMMA = ["norm", *[""] * (4 * LAYERS)]
"""The first norm adds nothing and is fused; every other one follows an addition of a normed branch."""


def repeat(count, *parts):
    """Add up counters, each taken `count` times."""
    return Counter({op: count * number for part in parts for op, number in part.items()})


def decoder(layer, head="norm"):
    """What is fused into each product of a graph whose layers are all alike."""
    return [*layer * LAYERS, head]


# family: (entries of config.json, what is fused into each product, nodes that remain onnxruntime's)
FAMILIES = {
    "llama": ({}, decoder(LAYER), SELECT_ROWS),
    "mistral": ({"sliding_window": 24}, decoder(LAYER), SELECT_ROWS),
    "qwen2": ({}, decoder(LAYER), SELECT_ROWS),
    "qwen3": ({}, decoder(LAYER), SELECT_ROWS + repeat(LAYERS, HEAD_NORMS)),
    "smollm3": ({"no_rope_layers": [1, 0, 1]}, decoder(LAYER), SELECT_ROWS),
    "phi3": ({}, decoder(LAYER), SELECT_ROWS),
    "granite": (
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4},
        decoder(LAYER),
        SELECT_ROWS + EMBEDDING_SCALE,
    ),
    "olmo2": (
        {},
        decoder(["", "", "", "gated"], ""),
        # normed branches are added by nodes of their own, the last one inside the final norm
        SELECT_ROWS
        + repeat(LAYERS, POST_NORMS)
        + repeat(LAYERS, PROJECTION_NORMS)
        + Counter({"Add": 2 * LAYERS - 1, "SkipSimplifiedLayerNormalization": 1}),
    ),
    "gemma2": (
        {"query_pre_attn_scalar": 16, "sliding_window": 20, "final_logit_softcapping": 4.0},
        GEMMA,
        SELECT_ROWS
        + EMBEDDING_SCALE
        + LOGIT_SOFTCAP
        + repeat(LAYERS, POST_NORMS)
        + repeat(LAYERS, NORMS_OF_SUMS)
        + repeat(LAYERS, GELU),
    ),
    "gemma3_text": (
        {"query_pre_attn_scalar": 16, "sliding_window": 12, "sliding_window_pattern": 2},
        GEMMA,
        SELECT_ROWS
        + EMBEDDING_SCALE
        + repeat(LAYERS, POST_NORMS)
        + repeat(LAYERS, NORMS_OF_SUMS)
        + repeat(LAYERS, GELU)
        + repeat(LAYERS, HEAD_NORMS),
    ),
}

PLAIN = ({}, decoder(LAYER), SELECT_ROWS)
"""The entry of a family that has none: it is fused like Llama, or the tests fail until it has an entry."""
ENTRIES = {family: FAMILIES.get(family, PLAIN) for family in load_architectures()}

PRECISIONS = [
    {"quant": "int5"},
    {"quant": "int6"},
    {"quant": "int8"},
    {"embedding_bits": 4},
    {"embedding_bits": 6},
    {"block_size": 64},
    {"block_size": 128},
    {"block_size": 16, "embedding_bits": 8},
]


@pytest.fixture(scope="module")
def export_family(tmp_path_factory, export_to_cache):
    """Export a random checkpoint of a family: (family, export options, entries of config.json) -> an opened bundle."""
    made = {}

    def export(family, export_options=(), **config):
        key = family, repr(config)
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", family, **config)
        return open_bundle(export_to_cache(made[key], **{"quant": "int4", **dict(export_options)}))

    return export


def rewritten_nodes(bundle, folder, model=None):
    """Rewrite a bundle's graph, or `model` in its place, for our kernels; return the nodes."""
    model = bundle.graph.read_bytes() if model is None else model
    assert rewrite_graph(model, bundle.graph.with_name("model.onnx.data"), folder)
    return read_model((folder / GRAPH).read_bytes()).nodes


def is_product(node):
    return node.domain == DOMAIN and node.op_type.startswith("MatMul")


def fused_parts(nodes):
    """What is fused into each product, in the order of the graph, such as "gated skip"."""
    found = []
    for node in filter(is_product, nodes):
        parts = {
            "norm": node.attributes["NORM"] != NO_OFFSET,
            "gated": node.attributes["GATED"],
            "skip": len(node.inputs) > 1,
        }
        found.append(" ".join(name for name, is_fused in parts.items() if is_fused))
    return found


def count_ours(nodes):
    """Count nodes of our operators: (products, lookups, attention)."""
    names = [node.op_type for node in nodes if node.domain == DOMAIN]
    assert all(name == ATTENTION or is_operator(name) for name in names)
    return tuple(sum(name.startswith(kind) for name in names) for kind in ("MatMul", "LookUp", ATTENTION))


def count_onnxruntime(nodes):
    """Count onnxruntime's operators by name."""
    return Counter(node.op_type for node in nodes if node.domain != DOMAIN)


def test_every_entry_is_a_family():
    assert FAMILIES.keys() <= load_architectures().keys()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ENTRIES)
def test_family_is_fused_in_full(family, tied, export_family, tmp_path):
    config, fused, remaining = ENTRIES[family]
    nodes = rewritten_nodes(export_family(family, tie_word_embeddings=tied, **config), tmp_path)
    assert count_ours(nodes) == (4 * LAYERS + 1, 1, LAYERS)
    assert fused_parts(nodes) == fused
    assert count_onnxruntime(nodes) == remaining


@pytest.mark.parametrize("options", PRECISIONS, ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_precision_is_fused_in_full(options, tied, export_family, tmp_path):
    """A table of 4 or 8 bits that no product reads is left to onnxruntime, which reads single rows of it."""
    bundle = export_family("llama", options, tie_word_embeddings=tied, hidden_size=128)
    matrices = bundle.manifest.matrices
    is_lookup_ours = tied or matrices[0].bits in (5, 6)
    nodes = rewritten_nodes(bundle, tmp_path)
    assert count_ours(nodes) == (4 * LAYERS + 1, is_lookup_ours, LAYERS)
    assert fused_parts(nodes) == decoder(LAYER)
    remaining = SELECT_ROWS if is_lookup_ours else SELECT_ROWS + Counter({"GatherBlockQuantized": 1})
    assert count_onnxruntime(nodes) == remaining
    assert {node.op_type for node in filter(is_product, nodes)} == {
        f"MatMulInt{matrix.bits}Block{matrix.block_size}" for matrix in (matrices if tied else matrices[1:])
    }


def test_biases_are_fused(export_family, tmp_path):
    nodes = rewritten_nodes(export_family("llama", attention_bias=True, mlp_bias=True), tmp_path)
    assert fused_parts(nodes) == decoder(LAYER)
    assert count_onnxruntime(nodes) == SELECT_ROWS
    has_bias = [node.attributes["BIAS"] != NO_OFFSET for node in filter(is_product, nodes)]
    assert has_bias == [True] * 4 * LAYERS + [False]


def test_gelu_stays_before_the_product(export_family, tmp_path):
    nodes = rewritten_nodes(export_family("llama", hidden_act="gelu_pytorch_tanh"), tmp_path)
    assert fused_parts(nodes) == decoder(GELU_LAYER)
    assert count_onnxruntime(nodes) == SELECT_ROWS + repeat(LAYERS, GELU)


@pytest.mark.parametrize("options", [{"quant": "fp32"}, {"symmetric": False, "embedding_bits": 4}], ids=str)
def test_matrices_without_kernels_stay(options, export_family, tmp_path):
    """There are no kernels for float32 and for zero points."""
    bundle = export_family("llama", options)
    assert rewrite_graph(bundle.graph.read_bytes(), bundle.graph.with_name("model.onnx.data"), tmp_path) == []


# reason: (export options, entries of config.json, nodes that remain beside the selection of rows)
OTHER_ATTENTION = {
    "int8 cache": ({"kv": "int8"}, {}, Counter({"GroupQueryAttention": LAYERS})),
    "head size 24": (
        {},
        {"head_dim": 24},
        Counter({"GroupQueryAttention": LAYERS, "RotaryEmbedding": 2 * LAYERS, "Split": LAYERS}),
    ),
}


@pytest.mark.parametrize("reason", OTHER_ATTENTION)
def test_attention_without_kernels_stays(reason, export_family, tmp_path):
    options, config, remaining = OTHER_ATTENTION[reason]
    nodes = rewritten_nodes(export_family("llama", options, **config), tmp_path)
    assert count_ours(nodes) == (4 * LAYERS + 1, 1, 0)
    assert fused_parts(nodes) == decoder(LAYER)
    assert count_onnxruntime(nodes) == SELECT_ROWS + remaining


@pytest.mark.parametrize("family", ENTRIES)
def test_fusion_depends_on_no_name(family, export_family, tmp_path):
    """Every node and value gets another name, except the inputs and outputs of the graph."""
    config, fused, remaining = ENTRIES[family]
    bundle = export_family(family, **config)
    model = onnx.load(bundle.graph, load_external_data=False)
    new = {value.name: value.name for value in [*model.graph.input, *model.graph.output]} | {"": ""}
    for i, node in enumerate(model.graph.node):
        node.name = f"node{i}"
        for names in (node.input, node.output):
            names[:] = [new.setdefault(name, f"value{len(new)}") for name in names]
    for tensor in model.graph.initializer:
        tensor.name = new[tensor.name]
    nodes = rewritten_nodes(bundle, tmp_path, model.SerializeToString())
    assert (fused_parts(nodes), count_onnxruntime(nodes)) == (fused, remaining)


@pytest.mark.parametrize("quant", ["int4", "int6"])
def test_graphs_of_earlier_exports_are_fused_in_full(quant, tmp_path):
    """Users do not export again when the kernels change.

    The files hold graphs as an earlier version wrote them, without weights. If the exporter writes other nodes one day,
    add its graphs and leave these as they are.
    """
    text = (Path(__file__).parent / "exported_graphs" / f"{quant}.txt").read_text(encoding="utf-8")
    model = parser.parse_model(text)
    for tensor in model.graph.initializer:  # the parser stores numbers one by one, an export as bytes
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    for value in model.graph.value_info:
        kind = value.type.tensor_type
        dims = [dim.dim_value for dim in kind.shape.dim]
        size = math.prod(dims) * helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
        model.graph.initializer.append(helper.make_tensor(value.name, kind.elem_type, dims, bytes(size), raw=True))
    assert rewrite_graph(model.SerializeToString(), tmp_path / "absent", tmp_path)
    nodes = read_model((tmp_path / GRAPH).read_bytes()).nodes
    assert count_ours(nodes) == (5, 1, 1)
    assert fused_parts(nodes) == [*LAYER, "norm"]
    assert count_onnxruntime(nodes) == SELECT_ROWS
