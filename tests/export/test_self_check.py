"""The self-check: every quantized export has one, and an unusable bundle is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
from edgelm_export.verify.self_check import CHECKED_TOKENS, SelfCheckError, raise_if_broken
from edgelm_export.write import matrix_store

from edgelm.bundle.bundle_folder import open_bundle

GOOD = {"tokens": 100, "perplexity": 22.0, "reference_perplexity": 20.0, "kl_mean": 0.1}


@pytest.fixture
def broken(monkeypatch):
    """Make the quantizer store rows in a wrong order."""
    quantize = matrix_store.quantize_matrix

    def mixed_up(rows, *given, **known):
        packed = quantize(rows, *given, **known)
        packed.data[:] = np.random.default_rng(0).permutation(packed.data)
        return packed

    monkeypatch.setattr(matrix_store, "quantize_matrix", mixed_up)


@pytest.mark.parametrize("options", [{"quant": "int8"}, {"fast": True}, {"quant": "int4"}, {"quant": "mixed"}], ids=str)
def test_every_quantized_export_reports_its_loss(options, stories_checkpoint, tmp_path):
    found = edgelm_export.export(stories_checkpoint, tmp_path / "out", **options).manifest.self_check
    assert found["kl_mean"] < 0.25
    assert 100 < found["tokens"] <= 5 * (CHECKED_TOKENS - 1)
    assert found == open_bundle(tmp_path / "out").manifest.self_check


def test_float32_needs_no_check(tiny_checkpoint, tmp_path):
    assert edgelm_export.export(tiny_checkpoint(), tmp_path / "out", quant="fp32").manifest.self_check is None


@pytest.mark.parametrize("options", [{"quant": "int8"}, {"fast": True}], ids=str)
def test_a_broken_bundle_is_not_written(options, broken, stories_checkpoint, tmp_path, run):
    with pytest.raises(SelfCheckError, match=r"self-check.*--force"):
        edgelm_export.export(stories_checkpoint, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []
    flags = ["--fast"] if "fast" in options else ["--quant", "int8"]
    code, out, err = run("export", stories_checkpoint, tmp_path / "out", *flags)
    assert (code, out) == (1, "")
    assert "self-check" in err
    assert len(err.strip().splitlines()) == 1


def test_force_writes_a_broken_bundle_with_its_figures(broken, stories_checkpoint, tmp_path, run):
    code, out, _ = run("export", stories_checkpoint, tmp_path / "out", "--quant", "int8", "--force", "--json")
    assert code == 0
    assert json.loads(out)["self_check"]["kl_mean"] > 1
    assert open_bundle(tmp_path / "out").manifest.self_check["kl_mean"] > 1


@pytest.mark.parametrize(
    "worse", [{"kl_mean": 1.2}, {"perplexity": 61.0}, {"perplexity": float("inf")}, {"kl_mean": float("nan")}], ids=str
)
def test_each_figure_alone_can_fail_the_check(worse):
    raise_if_broken(GOOD)
    with pytest.raises(SelfCheckError):
        raise_if_broken(GOOD | worse)
