"""Kernels are refused only if they compute wrong results, also for models that amplify rounding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from tiny import TinyLlama

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import EdgelmError
from edgelm.kernels.rewrite import attention_lowering, graph_rewriter
from edgelm.runtime import prepack, probe
from edgelm.runtime.ort import load_graph
from edgelm.runtime.prepack import verify_kernels

SINK = 7919 % 384
"""The first token of the probe."""


@dataclass(frozen=True)
class Outliers(TinyLlama):
    """A model with two channels of the residual stream that are `size` times as large as the others.

    Those of the probe's first token are large from the embedding on.
    """

    size: float = 1.0

    def tensors(self):
        found = super().tensors()
        for channel, sign in ((7, 1), (40, -1)):
            found["model.layers.0.mlp.down_proj.weight"][channel] *= self.size
            found["model.embed_tokens.weight"][SINK, channel] = sign * self.size
            found["model.layers.1.self_attn.k_proj.weight"][:, channel] *= 3
            found["model.norm.weight"][channel] = 0  # as in real models: these channels do not determine the logits
        return found


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory, export_to_cache):
    made = {}

    def make(size, quant):
        if size not in made:
            shape = Outliers(vocab=384, hidden=128, mlp=352, layers=4, size=size)
            made[size] = shape.write(tmp_path_factory.mktemp("outliers") / "model")
        return open_bundle(export_to_cache(made[size], quant=quant, fast=True, force=True))

    return make


@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("size", [1.0, 1e2, 1e3, 1e4])
def test_correct_kernels_are_accepted_for_models_that_amplify_rounding(bundle_of, quant, size):
    assert verify_kernels(bundle_of(size, quant), 1)


def scales_of_other_blocks(patch):
    packed = graph_rewriter.pack_scales
    patch.setattr(graph_rewriter, "pack_scales", lambda scales: np.roll(packed(scales), 1, axis=1))


def codes_of_other_columns(patch):
    packed = graph_rewriter.pack_codes
    patch.setattr(graph_rewriter, "pack_codes", lambda codes, *others: packed(codes[::-1], *others))


def no_rotation(patch):
    encode = attention_lowering.encode_node
    patch.setattr(attention_lowering, "encode_node", lambda *a: encode(*a[:-1], {**a[-1], "HALF": 0}))


def another_scale(patch):
    patch.setattr(attention_lowering, "_bits", lambda value: int(np.float32(8 * value).view(np.int32)))


@pytest.mark.parametrize("wrong", [scales_of_other_blocks, codes_of_other_columns, no_rotation, another_scale])
@pytest.mark.parametrize("quant", ["int4", "int8"])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_wrong_kernels_are_refused(bundle_of, monkeypatch, wrong, quant, size):
    wrong(monkeypatch)
    with pytest.raises(EdgelmError, match="nats"):
        verify_kernels(bundle_of(size, quant), 1)


def test_passes_of_any_size_compute_the_same_positions(bundle, monkeypatch):
    opened = open_bundle(bundle)
    loaded = load_graph(str(opened.graph), 1)
    whole = probe.compute_probe_logits(loaded, opened.manifest)
    assert len(whole) == min(probe.TOKENS, opened.manifest.context)
    np.testing.assert_allclose(
        probe.compute_probe_logits(loaded, opened.manifest, probe.PASS_SIZES), whole, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("which", [0, 1, 2])
def test_logits_that_are_not_finite_are_refused(which):
    logits = [np.ones((2, 8), np.float32) for _ in range(3)]
    assert probe.check_divergence(*logits) == (0.0, 0.0)
    logits[which][1, 3] = np.nan
    with pytest.raises(EdgelmError, match=r"finite|nan"):
        probe.check_divergence(*logits)


def test_graphs_with_products_of_onnxruntime_are_not_row_wise(bundle_of):
    """Their results may depend on the number of rows, so such a graph is never marked as batch-invariant."""
    assert not graph_rewriter.is_row_wise(bundle_of(1.0, "int4").graph.read_bytes())


def test_a_graph_whose_rows_depend_on_each_other_is_not_marked_invariant(bundle_of, tmp_path, monkeypatch):
    """Even if all its operators are row-wise."""
    found = prepack.compute_probe_logits
    calls = []

    def changed(*arguments):
        calls.append(arguments)
        return found(*arguments) + (np.float32(1e-6) if len(arguments) == 3 else np.float32(0))

    monkeypatch.setattr(prepack, "compute_probe_logits", changed)
    marked = []
    monkeypatch.setattr(prepack, "mark_invariant", lambda model: marked.append(model) or model)
    verify_kernels(bundle_of(1.0, "int4"), 1)
    assert len(calls) == 4
    assert not marked
