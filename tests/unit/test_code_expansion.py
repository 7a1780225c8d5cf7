"""Codes of 5 and 6 bits expanded before onnxruntime loads a graph: they are the codes that it would compute."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import onnxruntime as ort

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.kernels.rewrite.code_expansion import expand_codes
from edgelm.runtime.ort import load_graph, load_packed
from edgelm.runtime.probe import compute_probe_logits
from edgelm.runtime.threads import ThreadSettings

SHAPES = [{"quant": "int5"}, {"quant": "int6"}, {"quant": "int4", "embedding_bits": 6}, {"quant": "int4"}]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_expanded_codes_are_those_that_onnxruntime_computes(options, tied, tiny_checkpoint, export_to_cache):
    bundle = open_bundle(export_to_cache(tiny_checkpoint(tied=tied, mlp=172), **options))
    folded = ort.InferenceSession(str(bundle.graph), providers=["CPUExecutionProvider"])
    expanded = load_graph(str(bundle.graph), 1)
    logits = [compute_probe_logits(graph, bundle.manifest) for graph in (expanded, folded)]
    assert np.array_equal(*logits)
    split = [matrix for matrix in bundle.manifest.matrices if matrix.bits in (5, 6)]
    found = expand_codes(bundle.graph.read_bytes(), bundle.graph.with_name("model.onnx.data"))
    assert found is not None
    assert sum(codes.size for codes in found.codes.values()) >= sum(matrix.rows * matrix.columns for matrix in split)
    assert b"BitwiseXor" not in found.model


def test_a_graph_without_split_codes_is_unchanged(tiny_checkpoint, export_to_cache):
    bundle = open_bundle(export_to_cache(tiny_checkpoint(), quant="int8"))
    assert expand_codes(bundle.graph.read_bytes(), bundle.graph.with_name("model.onnx.data")) is None


def test_onnxruntime_saves_expanded_codes_packed(tiny_checkpoint, export_to_cache, tmp_path):
    bundle = open_bundle(export_to_cache(tiny_checkpoint(), quant="int6"))
    expected = compute_probe_logits(load_graph(str(bundle.graph), 1, save_to=tmp_path), bundle.manifest)
    found = compute_probe_logits(load_packed(tmp_path, ThreadSettings(1)), bundle.manifest)
    assert np.allclose(found, expected, atol=1e-4)
