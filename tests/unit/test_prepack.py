"""Weights that onnxruntime packs for this board: they give the same logits, and damage is detected."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import BundleError
from edgelm.runtime import prepack
from edgelm.runtime.ort import PACKED_GRAPH_FILE, cache_key
from edgelm.runtime.prepack import open_graph, open_verified
from edgelm.runtime.runner import open_runner
from edgelm.runtime.threads import ThreadSettings, count_cores
from edgelm.system.board_cache import BoardCache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that stores small bundles too, on a board without kernels of ours."""
    monkeypatch.setattr(prepack, "_is_cacheable", lambda bundle: bundle.manifest.cache.kind == "shared")
    monkeypatch.setattr(prepack, "_try_native_kernels", lambda *_: [])
    return BoardCache(tmp_path / "cache")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "edgelm")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def own(bundle, tmp_path):
    """A copy of the bundle that a test may damage."""
    return shutil.copytree(bundle, tmp_path / "bundle")


def logits_of(path, cache):
    runner = open_runner(open_verified(path, cache), rows=2, threads=1, cache=cache)
    first = runner.prefill(0, np.arange(2, 9), 0).copy()
    return np.concatenate([first, runner.decode(np.array([3]), np.array([7], np.int32))])


@pytest.mark.parametrize("quant", ["fp32", "int8", "int4"])
def test_packed_weights_compute_the_same_bits(tiny_checkpoint, export_to_cache, cache, quant, said):
    path = export_to_cache(tiny_checkpoint(vocab=384, hidden=128, mlp=256), quant=quant)
    plain = logits_of(path, None)
    for _ in range(2):  # packed, then found
        np.testing.assert_array_equal(logits_of(path, cache), plain)
    assert len(list(cache.entries())) == 1
    assert said() == []


def test_weights_are_packed_once(bundle, cache, monkeypatch):
    logits_of(bundle, cache)
    monkeypatch.setattr(prepack, "_pack", lambda *_: pytest.fail("packed again"))
    logits_of(bundle, cache)


@pytest.mark.parametrize("min_bytes", [prepack.MIN_CACHED_BYTES, 0])
def test_small_and_float32_bundles_are_not_cached(float32_bundle, tmp_path, monkeypatch, min_bytes):
    monkeypatch.setattr(prepack, "MIN_CACHED_BYTES", min_bytes)
    cache = BoardCache(tmp_path / "cache")
    logits_of(float32_bundle, cache)
    assert not cache.folder.exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "no graph"])
def test_a_damaged_entry_is_reported_once_and_made_again(bundle, cache, damage, said):
    plain = logits_of(bundle, cache)
    (entry,) = cache.entries()
    file = entry.path / (PACKED_GRAPH_FILE if damage == "no graph" else f"{PACKED_GRAPH_FILE}.data")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
    else:
        content = bytearray(b"nonsense")
    file.write_bytes(content)
    for _ in range(2):
        np.testing.assert_array_equal(logits_of(bundle, cache), plain)
    assert len(said()) == 1, said()
    assert str(entry.path) in said()[0]


def test_an_entry_that_onnxruntime_refuses_is_packed_again(bundle, cache, said):
    """An entry that matches its stamp but cannot be loaded."""
    opened = open_bundle(bundle)

    def nonsense(folder):
        (folder / PACKED_GRAPH_FILE).write_bytes(b"nonsense")
        return {}

    cache.make(cache_key(opened, "weights"), 1, nonsense)
    open_graph(opened, ThreadSettings(1), cache)
    assert len(said()) == 1, said()
    open_graph(opened, ThreadSettings(1), cache)
    assert len(said()) == 1, "said once"


def test_a_copy_that_computes_something_else_is_never_used(bundle, cache, monkeypatch, said):
    plain = logits_of(bundle, None)
    numbers = iter(range(100))
    monkeypatch.setattr(prepack, "compute_probe_logits", lambda *_: np.array([next(numbers)]))
    np.testing.assert_array_equal(logits_of(bundle, cache), plain)
    assert len(said()) == 1
    assert str(bundle) in said()[0]
    (entry,) = cache.entries()
    assert entry.bytes < 10_000
    monkeypatch.setattr(prepack, "_pack", lambda *_: pytest.fail("tried again"))
    np.testing.assert_array_equal(logits_of(bundle, cache), plain)
    assert len(said()) == 1, "said once"


@pytest.mark.parametrize("vocab", [331, 332, 333])
def test_matrices_of_any_size_are_correct(tiny_checkpoint, export_to_cache, cache, vocab):
    path = export_to_cache(tiny_checkpoint(vocab=vocab), quant="int4")
    plain = logits_of(path, None)
    for _ in range(2):
        np.testing.assert_array_equal(logits_of(path, cache), plain)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_damage_of_a_bundle_is_detected_although_its_weights_are_packed(own, cache, name):
    logits_of(own, cache)
    logits_of(own, cache)
    file = own / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(BundleError, match=name):
        open_verified(own, cache)


def test_a_copy_of_a_bundle_shares_the_packed_weights(own, bundle, cache):
    logits_of(bundle, cache)
    for file in own.iterdir():
        file.touch()
    logits_of(own, cache)
    (entry,) = cache.entries()
    assert entry.metadata["bundle"] == str(own), "its files are known from now on"
    assert set(prepack._unchanged(open_bundle(own), entry)) == {"model.onnx", "model.onnx.data"}


def test_a_cache_that_cannot_be_written_is_reported_in_one_line(bundle, cache, tmp_path, said):
    (tmp_path / "file").write_text("not a folder")
    plain = logits_of(bundle, None)
    np.testing.assert_array_equal(logits_of(bundle, BoardCache(tmp_path / "file" / "cache")), plain)
    assert len(said()) == 1


def test_more_threads_than_cores_are_reported(bundle, said):
    open_graph(open_bundle(bundle), ThreadSettings(count_cores() + 1))
    assert len(said()) == 1
    assert str(count_cores() + 1) in said()[0]
