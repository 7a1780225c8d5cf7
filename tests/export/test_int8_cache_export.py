"""Exports with an int8 KV cache: scales, sizes, the quality gate, architectures with unusual attention."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
import onnx
from edgelm_export.calibration.text_samples import calibration_documents
from edgelm_export.int8_kv.int8_cache_graph import MIN_ONNXRUNTIME
from edgelm_export.source_model import open_source_model
from onnx import numpy_helper
from tiny import TEXT

from edgelm.errors import EdgelmError
from edgelm.runtime.ort import ORT_RELEASE
from edgelm.runtime.runner import open_runner

too_old = tuple(map(int, MIN_ONNXRUNTIME.split("."))) > ORT_RELEASE
needs_runtime = pytest.mark.skipif(too_old, reason=f"needs onnxruntime {MIN_ONNXRUNTIME}")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    generator = np.random.default_rng(0)
    words = " ".join(TEXT).split()
    documents = [" ".join(generator.choice(words, 60)) for _ in range(12)]
    file.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return file


def scales_of(bundle):
    """Layer and part -> float32 [kv_heads, head_size]."""
    tensors = onnx.load(bundle.graph, load_external_data=False).graph.initializer
    named = {t.name: numpy_helper.to_array(t) for t in tensors if t.name.endswith((".key.scale", ".value.scale"))}
    return {name: array[0, :, 0] for name, array in named.items()}


@needs_runtime
@pytest.mark.parametrize("fields", [{}, {"head_size": 12}, {"head_size": 8, "kv_heads": 4}], ids=str)
def test_no_value_on_the_calibration_text_exceeds_its_scale(fields, text, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(**fields)
    options = {"quant": "fp32", "calibrate": text, "verify": text}
    bundle = edgelm_export.export(checkpoint, tmp_path / "int8", kv="int8", **options)
    plain = edgelm_export.export(checkpoint, tmp_path / "fp32", quant="fp32")
    scales = scales_of(bundle)
    assert len(scales) == 4  # layers, keys and values
    assert all(np.isfinite(each).all() and (each > 0).all() for each in scales.values())
    documents = calibration_documents(text.read_text("utf-8"), open_source_model(checkpoint).tokenizer, 0, 512, 65536)
    sessions = [open_runner(each, rows=1, threads=1) for each in (bundle, plain)]
    highest = 0
    for document in documents:
        codes, exact = [], []
        for session, found in zip(sessions, (codes, exact), strict=True):
            session.prefill(0, document, 0)
            found.extend(session.read_row(0, 0, len(document)))
        highest = max(highest, *(np.abs(array.astype(int)).max() for array in codes[:2]))
        size = bundle.manifest.shapes["head_size"]
        for name, code, value in zip(scales, codes[:2], exact[:2], strict=False):  # later layers have rounded inputs
            assert np.abs(code * scales[name][:, None] - value).max() <= 0.51 * scales[name].max()
            assert (code[..., size:] == 0).all()
    assert 120 <= highest <= 127
    quality = bundle.manifest.quality
    assert 0 < quality["kl_mean"] < 1e-3  # below 1e-9 without the int8 cache
    assert bundle.manifest.quant == "fp32"


@needs_runtime
def test_the_outline_has_the_size_of_an_int8_cache(text, tiny_checkpoint, tmp_path):
    for options in ({}, {"quant": "mixed", "calibrate": text}):
        outline = edgelm_export.outline(tiny_checkpoint(), kv="int8", **options)
        bundle = edgelm_export.export(tiny_checkpoint(), tmp_path / "out", kv="int8", force=True, **options)
        assert abs(bundle.bytes - outline.bytes) <= 512
        assert bundle.manifest.cache.bits == 8


@needs_runtime
def test_info_shows_the_int8_cache(tiny_checkpoint, tmp_path, run):
    code, out, err = run("export", tiny_checkpoint(), tmp_path / "out", "--kv", "int8", "--json")
    assert (code, json.loads(out)["quant"]) == (0, "int4"), err
    code, out, _ = run("info", tmp_path / "out")
    assert code == 0
    assert f"onnxruntime {MIN_ONNXRUNTIME} or newer" in out
    assert "128 bytes" in out
    code, out, _ = run("info", tmp_path / "out", "--json")
    assert json.loads(out)["cache"]["bits"] == 8
    assert json.loads(out)["kv_bytes_per_token"] == 128


def test_an_older_runtime_is_refused_before_any_work(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("edgelm.runtime.ort.ORT_RELEASE", (1, 23))
    with pytest.raises(EdgelmError, match=f"--kv int8.*onnxruntime {MIN_ONNXRUNTIME}"):
        edgelm_export.export(tiny_checkpoint(), tmp_path / "out", kv="int8")
    assert not (tmp_path / "out").exists()
