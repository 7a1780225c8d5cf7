"""The catalogue's sizes are those of the models' published shapes."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from published import CATALOGUE, PUBLISHED

from edgelm.bundle.catalogue import load_catalogue
from tests.bench.catalogue import sized


def test_every_model_has_recorded_shapes():
    assert set(CATALOGUE) == set(load_catalogue())


@pytest.mark.parametrize("name", sorted(load_catalogue()))
def test_sizes_are_computed_from_shapes(name):
    model = load_catalogue()[name]
    assert model.parameters == PUBLISHED[CATALOGUE[name]][1]
    for variant in model.variants:
        assert (variant.mb, variant.memory_mb) == sized(model, variant)


def test_a_real_bundle_has_the_size_in_the_catalogue(smollm2_gguf, tmp_path):
    import edgelm_export

    variant = next(variant for variant in load_catalogue()["smollm2-135m"].variants if variant.quant == "int8")
    bundle = edgelm_export.export(smollm2_gguf, tmp_path / "bundle", quant="int8")
    weights = (bundle.path / "model.onnx.data").stat().st_size
    assert weights / 1e6 == pytest.approx(variant.mb, rel=0.02)
