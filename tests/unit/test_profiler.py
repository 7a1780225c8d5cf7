"""`edgelm bench --profile` on real bundles: table, JSON, temporary files, invalid options."""

from __future__ import annotations

import json
import tempfile

import pytest

from edgelm.bench import profiler
from edgelm.bench.trace import MATMUL_OPERATORS
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.kernels.abi import WeightFormat
from edgelm.runtime import prepack
from edgelm.system.board_cache import BoardCache

SIZES = ["--prompt-tokens", 20, "--new-tokens", 5, "--repeat", 2, "--threads", 1, "--no-cache"]


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(params=["bundle", "builtin"])
def profiled(request):
    return "builtin" if request.param == "builtin" else str(request.getfixturevalue("bundle"))


def is_product(operator):
    return operator in MATMUL_OPERATORS or WeightFormat.from_op_type(operator) is not None


def test_the_sums_in_the_json_agree(profiled, run, scratch):
    code, out, err = run("bench", profiled, *SIZES, "--profile", "--batch", "1,3", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert {"threads", "memory_bandwidth_gb_s", "phases"} <= set(printed)
    phases = printed["phases"]
    assert [(phase["phase"], phase["batch"], phase["steps"]) for phase in phases] == [
        ("prefill", 1, 2),
        ("decode", 1, 5),
        ("decode", 3, 5),
    ]
    layers = open_bundle(profiled).manifest.cache.layers
    for phase in phases:
        for table in (phase["operators"], phase["layers"]):
            assert sum(row["us"] for row in table) == pytest.approx(phase["nodes_us"], abs=0.1)
            assert sum(row["share"] for row in table) == pytest.approx(1, abs=1e-3)
        assert phase["nodes_us"] + phase["between_us"] == pytest.approx(phase["run_us"], abs=0.1)
        assert phase["run_us"] + phase["outside_us"] == pytest.approx(phase["step_us"], abs=0.1)
        assert min(phase[name] for name in ("nodes_us", "between_us", "outside_us", "plain_us")) > 0
        assert [row["part"] for row in phase["layers"]] == ["embedding", *(f"layer {i}" for i in range(layers)), "head"]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("own_kernels", [False, True], ids=["onnxruntime's kernels", "our kernels"])
def test_every_layer_has_its_matrix_products(profiled, own_kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(prepack, "MIN_CACHED_BYTES", 0 if own_kernels else 10**12)
    manifest = open_bundle(profiled).manifest
    sizes = {"prompt_tokens": 20, "new_tokens": 3, "repeat": 1, "threads": 1}
    found = profiler.profile_bundle(profiled, **sizes, cache=BoardCache(tmp_path / "cache"))
    for phase in found.phases:
        _, *layers, head = phase.typical_step.parts
        for part in layers:
            assert sum(map(is_product, part.operators)) == 4, part  # qkv, output, gate_up, down
        assert sum(map(is_product, head.operators)) == 1
        if own_kernels and any(matrix.bits < 32 for matrix in manifest.matrices):
            assert any(map(WeightFormat.from_op_type, head.operators))
        read = [each for each in phase.typical_step.operators if each.bytes]
        assert sum(each.nodes for each in read) == 4 * manifest.cache.layers + 1
        named = {(matrix.columns, matrix.rows, matrix.bits) for matrix in manifest.matrices}
        assert {(*each.shape, each.bits) for each in read} <= named


def test_a_long_prompt_is_one_pass_of_several_runs(bundle):
    context = open_bundle(bundle).manifest.context
    tokens = min(300, context - 3)
    (prefill, decode) = profiler.profile_bundle(
        str(bundle), prompt_tokens=tokens, new_tokens=3, repeat=1, threads=1
    ).phases
    runs = -(-tokens // profiler.PREFILL_CHUNK)
    nodes = sum(each.nodes for each in decode.typical_step.operators)
    assert sum(each.nodes for each in prefill.typical_step.operators) == runs * nodes
    assert (prefill.tokens, decode.context) == (tokens, tokens)


def test_the_table_has_all_rows(profiled, run):
    code, out, err = run("bench", profiled, *SIZES, "--profile")
    assert (code, err) == (0, "")
    for text in ("prefill of 20", "decode of 1 at 20", "GroupQueryAttention", "GB/s"):
        assert text in out
    for text in (
        "all nodes",
        "between the nodes",
        "outside the graph",
        "not profiled",
        "by layer",
        "embedding",
        "head",
    ):
        assert out.count(text) == 2, text


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--batch", "0"], 1), (["--new-tokens", "0"], 1), (["--prompt-tokens", "999999"], 1), (["--tune"], 2)],
    ids=str,
)
def test_invalid_sizes_are_refused(options, code, bundle, run):
    exit_code, out, err = run("bench", bundle, "--profile", *options)
    assert (exit_code, out) == (code, "")
    assert "internal error" not in err


def test_an_incomplete_profile_is_an_error(bundle, run, scratch, monkeypatch):
    whole = profiler.parse_runs
    monkeypatch.setattr(profiler, "parse_runs", lambda events: whole(events)[:-1])
    code, out, err = run("bench", bundle, *SIZES, "--profile")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "10 of 11 runs" in err  # 3 prefills and 8 steps
    assert list(scratch.iterdir()) == []


def test_an_interrupted_profile_leaves_no_file(bundle, scratch, monkeypatch):
    def interrupt(*_):
        assert [file.name[:4] for file in next(scratch.iterdir()).iterdir()] == ["runs"]  # onnxruntime has created it
        raise KeyboardInterrupt

    decode = profiler._decode
    monkeypatch.setattr(
        profiler, "_decode", lambda runner, *rest: interrupt() if any(scratch.iterdir()) else decode(runner, *rest)
    )
    with pytest.raises(KeyboardInterrupt):
        profiler.profile_bundle(str(bundle), prompt_tokens=4, new_tokens=1, repeat=1, threads=1)
    assert list(scratch.iterdir()) == []


def test_prepacked_weights_can_be_profiled(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(prepack, "_is_cacheable", lambda _: True)
    cache = BoardCache(tmp_path / "cache")
    for _ in range(2):  # packed, then found
        sizes = {"prompt_tokens": 4, "new_tokens": 2, "repeat": 1, "threads": 1}
        found = profiler.profile_bundle(str(bundle), **sizes, cache=cache)
        assert len(list(cache.entries())) == 1
        assert all(phase.typical_step.parts for phase in found.phases)
