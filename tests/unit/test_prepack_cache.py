"""Weights packed for our own kernels: compiled and cached for this board; else onnxruntime's kernels are used."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import EdgelmError
from edgelm.graph.onnx_model import read_model
from edgelm.runtime import prepack, probe
from edgelm.runtime.ort import PACKED_GRAPH_FILE
from edgelm.runtime.prepack import FORMATS, KERNELS, open_verified, verify_kernels
from edgelm.runtime.runner import open_runner
from edgelm.system.board_cache import BoardCache

SHAPE = {"vocab": 16000, "hidden": 512, "mlp": 2048, "heads": 8, "kv_heads": 4}
"""Large enough for the board cache: 16 MB in int8."""

SMALL = {"vocab": 384, "hidden": 128, "mlp": 352}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that stores small bundles too."""
    monkeypatch.setattr(prepack, "MIN_CACHED_BYTES", 0)
    return BoardCache(tmp_path / "cache")


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "edgelm")
    return lambda least=logging.WARNING: [r.getMessage() for r in caplog.records if r.levelno >= least]


@pytest.fixture
def small(tiny_checkpoint, export_to_cache):
    return export_to_cache(tiny_checkpoint(**SMALL), quant="int4")


def logits_of(path, cache):
    runner = open_runner(open_verified(path, cache), rows=2, threads=1, cache=cache)
    first = runner.prefill(0, np.arange(2, 9), 0).copy()
    return np.concatenate([first, runner.decode(np.array([3]), np.array([7], np.int32))])


def apart(one, other):
    """Root mean square of the difference, in standard deviations."""
    return float(np.sqrt(np.mean((one - other) ** 2)) / other.std())


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("vocab", [331, 384])
def test_our_kernels_compute_what_onnxruntimes_do(tiny_checkpoint, export_to_cache, cache, quant, vocab, said):
    path = export_to_cache(tiny_checkpoint(**SMALL | {"vocab": vocab}), quant=quant)
    plain = logits_of(path, None)
    found = [logits_of(path, cache) for _ in range(2)]  # packed, then found
    np.testing.assert_array_equal(*found)
    assert 0 < apart(found[0], plain) < 0.05
    (entry,) = cache.entries()
    assert entry.metadata[FORMATS]
    operators = {node.op_type for node in read_model((entry.path / PACKED_GRAPH_FILE).read_bytes()).nodes}
    taken_over = {"MatMulNBits", "Cast", "Split", "QuickGelu", "Mul", "SkipSimplifiedLayerNormalization"}
    assert not operators & taken_over, "the kernels compute all of these"
    assert said() == []


def test_matrices_of_several_formats_run_side_by_side(tiny_checkpoint, export_to_cache, cache):
    path = export_to_cache(tiny_checkpoint(**SMALL), quant="mixed", calibrate="self")
    assert apart(logits_of(path, cache), logits_of(path, None)) < 0.05
    (entry,) = cache.entries()
    matrices = open_bundle(path).manifest.matrices
    assert len(entry.metadata[FORMATS]) > 1
    assert {tuple(form) for form in entry.metadata[FORMATS]} <= {
        (matrix.bits, matrix.block_size) for matrix in matrices
    }


ASYMMETRIC = {"quant": "int4", "symmetric": False, "embedding_bits": 4}


def test_bundles_without_kernels_of_ours_run_on_onnxruntimes(tiny_checkpoint, export_to_cache, cache, said):
    path = export_to_cache(tiny_checkpoint(**SMALL), **ASYMMETRIC)
    np.testing.assert_array_equal(logits_of(path, cache), logits_of(path, None))
    (entry,) = cache.entries()
    assert FORMATS not in entry.metadata
    assert said() == []


@pytest.mark.parametrize("missing", ["compiler", "library", "graph"])
def test_without_our_kernels_onnxruntimes_are_used(small, cache, monkeypatch, missing, said):
    plain = logits_of(small, None)
    if missing == "compiler":
        monkeypatch.setattr(sys, "executable", "/bin/false")
    elif missing == "library":
        monkeypatch.setattr(prepack, "_compile", lambda library, _: library.write_bytes(b"nonsense"))
    else:
        monkeypatch.setattr(prepack, "rewrite_graph", lambda *_: 1 / 0)
    np.testing.assert_array_equal(logits_of(small, cache), plain)
    (entry,) = cache.entries()
    assert FORMATS not in entry.metadata
    assert not (entry.path / KERNELS).exists()
    assert said() == []
    assert any(str(small) in line for line in said(logging.INFO))
    monkeypatch.setattr(prepack, "_pack", lambda *_: pytest.fail("tried again"))
    np.testing.assert_array_equal(logits_of(small, cache), plain)


def test_kernels_with_other_results_are_never_used(small, cache, monkeypatch, said):
    plain = logits_of(small, None)
    logits = np.eye(3, 8, dtype=np.float32)
    probes = iter([-9 * logits, -9 * logits, logits, logits])  # ours, ours in passes, onnxruntime's, exact ones
    monkeypatch.setattr(prepack, "compute_probe_logits", lambda *_: next(probes))
    monkeypatch.setattr(prepack, "_prepack", lambda *_: "not now")
    np.testing.assert_array_equal(logits_of(small, cache), plain)
    assert "nats" in said()[0]


def test_a_torn_library_is_reported_once_and_made_again(small, cache, said):
    expected = logits_of(small, cache)
    (entry,) = cache.entries()
    content = (entry.path / KERNELS).read_bytes()
    (entry.path / KERNELS).unlink()  # this process still has the old file mapped
    (entry.path / KERNELS).write_bytes(content[: len(content) // 2])
    np.testing.assert_array_equal(logits_of(small, cache), expected)
    assert len(said()) == 1
    assert str(entry.path) in said()[0]


def test_logits_of_a_batch_are_the_same_bits_as_alone(small, cache):
    runner = open_runner(open_verified(small, cache), rows=4, threads=2, cache=cache)
    prompts = [np.arange(2 + row, 9 + row) for row in range(4)]
    for row, prompt in enumerate(prompts):
        runner.prefill(row, prompt, 0)
    together = runner.decode(np.array([3, 4, 5, 6]), np.full(4, 7, np.int32)).copy()
    for row in range(4):
        runner.prefill(0, prompts[row], 0)
        alone = runner.decode(np.array([3 + row]), np.full(1, 7, np.int32))
        np.testing.assert_array_equal(alone[0], together[row])


ANONYMOUS = """
import sys, edgelm
with edgelm.load(sys.argv[1], threads=1, max_batch=1, cache=sys.argv[2] == "cache") as lm:
    lm.generate(tokens=[2, 3, 4], max_tokens=4)
    text = open("/proc/self/smaps_rollup").read()
    print(1024 * int(text.split("Anonymous:")[1].split()[0]))
    print("llvmlite" in sys.modules)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports private memory")
@pytest.mark.parametrize("options", [{}, {"symmetric": False}], ids=["ours", "onnxruntime's"])
def test_packed_weights_are_mapped_not_copied(tiny_checkpoint, export_to_cache, monkeypatch, tmp_path, options):
    """For the kernels of both; and running compiled kernels does not load the compiler."""
    path = export_to_cache(tiny_checkpoint(**SHAPE), quant="int8", **options)
    monkeypatch.setenv("EDGELM_CACHE_DIR", str(tmp_path / "cache"))

    def anonymous(how):
        done = subprocess.run([sys.executable, "-c", ANONYMOUS, path, how], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        size, compiler = done.stdout.split()
        assert compiler == "False"
        return int(size)

    without = anonymous("plain")
    assert not (tmp_path / "cache").exists()
    anonymous("cache")
    held = sum(matrix.bytes() for matrix in open_bundle(path).manifest.matrices)
    assert anonymous("cache") < without - 0.7 * held


def test_kernels_can_be_verified(small, tiny_checkpoint, export_to_cache, monkeypatch):
    summary = verify_kernels(open_bundle(small), 1)
    assert "int4 in blocks of " in summary
    assert "\n" not in summary
    with pytest.raises(OSError, match="fp32"):
        verify_kernels(open_bundle(export_to_cache(tiny_checkpoint(**SMALL), quant="fp32")))
    monkeypatch.setattr(probe, "MAX_DIVERGENCE_RATIO", 0.0)
    monkeypatch.setattr(probe, "DIVERGENCE_TOLERANCE", 0.0)
    with pytest.raises(EdgelmError, match="nats"):
        verify_kernels(open_bundle(small), 1)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="compiled"):
        verify_kernels(open_bundle(small), 1)


def test_the_built_in_bundle_runs_on_our_kernels(cache, said):
    with edgelm.load("builtin", threads=1) as lm:
        path = lm.bundle.path
    assert apart(logits_of(path, cache), logits_of(path, None)) < 0.1
    (entry,) = cache.entries()
    assert entry.metadata[FORMATS]
    assert said() == []
