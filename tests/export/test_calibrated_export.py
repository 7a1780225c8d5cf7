"""Calibration, budgets, the quality gate and the report, on real and random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
from folder_hashes import contents

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
from edgelm_export.calibration.layers import ReferenceModel
from edgelm_export.self_generated import sample_calibration_documents
from edgelm_export.source_model import open_source_model
from tiny import TEXT

import edgelm
from edgelm.errors import EdgelmError

SHAPE = {"hidden": 64, "mlp": 112, "layers": 2, "vocab": 331}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of different sentences: to calibrate on, and to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    generator = np.random.default_rng(0)
    words = " ".join(TEXT).split()
    for name, documents in (("calibrate.txt", 40), ("verify.txt", 8)):
        made = [" ".join(generator.choice(words, 60)) for _ in range(documents)]
        (folder / name).write_text("\n<|endoftext|>\n".join(made), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stories_texts(shared, tmp_path_factory):
    """A few stories to calibrate on, and others to measure on."""
    folder = tmp_path_factory.mktemp("stories")
    for name, count in (("train.txt", 40), ("dev.txt", 12)):
        documents = (shared / "data" / "tinystories" / name).read_text("utf-8").split("<|endoftext|>")[:count]
        (folder / name).write_text("<|endoftext|>".join(documents), encoding="utf-8")
    return folder


def test_the_layers_give_the_logits_of_the_runtime(tiny_checkpoint, export_to_cache):
    """ReferenceModel, layer by layer, equals the float32 bundle."""
    for fields in ({"tied": False, "attention_bias": True, "mlp_bias": True}, {"head_size": 24, "kv_heads": 1}):
        checkpoint = tiny_checkpoint(**fields)
        documents = [np.arange(length, dtype=np.int64) % 300 for length in (1, 7, 130)]
        layers = ReferenceModel(open_source_model(checkpoint).weights, 130, threads=1)
        hidden = layers.embed(documents)
        for i in range(2):
            hidden = layers.load_layer(i).forward(hidden)
        head = layers.head().read_all()
        with edgelm.load(export_to_cache(checkpoint, quant="fp32"), threads=1, max_batch=1) as model:
            for document, states in zip(documents, hidden, strict=True):
                want = model.worker.call(lambda e, d=document: e.runner.prefill(0, d, 0, all_logits=True).copy())
                assert np.abs(layers.logits(layers.apply_final_norm(states), head) - want).max() < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_calibration_loses_less_than_the_search(tied, texts, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(**SHAPE, tied=tied)
    options = {"block_size": 32, "verify": texts / "verify.txt"}
    plain = edgelm_export.export(checkpoint, tmp_path / "plain", **options, quant="int4", fast=True).manifest
    calibrated = edgelm_export.export(
        checkpoint, tmp_path / "gptq", **options, calibrate=texts / "calibrate.txt"
    ).manifest
    assert calibrated.quality["kl_mean"] < 0.8 * plain.quality["kl_mean"]
    assert calibrated.bits_per_weight == plain.bits_per_weight
    methods = {matrix.name: matrix.method for matrix in calibrated.matrices}
    assert methods.pop("embedding") == ("gptq" if tied else "clip")  # an untied embedding has no inputs
    assert set(methods.values()) == {"gptq"}


def test_a_real_model_keeps_its_quality(stories_checkpoint, stories_texts, tmp_path):
    measured = {}
    for name, options in {
        "fp32": {"quant": "fp32"},
        "int8": {"quant": "int8"},
        "clip": {"quant": "int4", "fast": True},
        "self": {},
        "gptq": {"calibrate": stories_texts / "train.txt"},
        "mixed": {"quant": "mixed", "calibrate": stories_texts / "train.txt"},
    }.items():
        bundle = edgelm_export.export(stories_checkpoint, tmp_path / name, verify=stories_texts / "dev.txt", **options)
        measured[name] = bundle.manifest
    assert measured["fp32"].quality["kl_mean"] < 1e-9
    assert measured["fp32"].quality["top1_agreement"] == 1
    kl = {name: manifest.quality["kl_mean"] for name, manifest in measured.items()}
    assert kl["int8"] < 0.003 < kl["mixed"] < kl["gptq"] < 0.7 * kl["clip"]
    assert kl["self"] < 0.7 * kl["clip"]
    assert measured["gptq"].bits_per_weight <= 4.75
    assert 5.3 < measured["mixed"].bits_per_weight <= 5.5
    assert len({matrix.bits for matrix in measured["mixed"].matrices} & {4, 5, 6, 8}) > 1
    assert measured["mixed"].quant == "mixed"


def test_the_manifest_has_what_eval_measures(stories_checkpoint, stories_texts, tmp_path, run):
    divider = "\n<|endoftext|>\n"
    whole = (stories_texts / "dev.txt").read_text("utf-8").split(divider)
    dev = tmp_path / "dev.txt"  # only stories within the context; longer ones are measured in several sequences
    dev.write_text(divider.join(story for story in whole if len(story) < 1000), "utf-8")
    bundle = edgelm_export.export(stories_checkpoint, tmp_path / "out", verify=dev)
    quality = bundle.manifest.quality
    assert quality["text"] == "dev.txt"
    assert quality["tokens"] > 3000
    code, out, _ = run("eval", bundle.path, "--text", str(dev), "--reference", stories_checkpoint, "--json")
    assert code == 0
    measured = json.loads(out)
    assert measured["reference"] == pytest.approx(quality)
    assert measured["perplexity"] == pytest.approx(quality["perplexity"], rel=1e-4)
    assert measured["tokens"] == quality["tokens"]
    code, out, _ = run("info", bundle.path)
    assert f"{quality['perplexity']:.4f}" in out
    assert f"{100 * quality['top1_agreement']:.2f} %" in out


def test_a_limit_of_bytes_is_met_and_used(texts, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(**SHAPE)
    options = {"calibrate": texts / "calibrate.txt", "verify": texts / "verify.txt", "method": "clip"}
    least = edgelm_export.export(checkpoint, tmp_path / "int4", verify=texts / "verify.txt")
    most = edgelm_export.export(checkpoint, tmp_path / "int8", quant="int8", verify=texts / "verify.txt")
    middle = (least.bytes + most.bytes) // 2
    bundle = edgelm_export.export(checkpoint, tmp_path / "middle", **options, max_bytes=middle)
    assert 0.9 * middle < bundle.bytes <= middle
    kl = [each.manifest.quality["kl_mean"] for each in (most, bundle, least)]
    assert kl[0] < kl[1] < kl[2]
    others = least.bytes - sum(matrix.bytes() for matrix in least.manifest.matrices)
    with pytest.raises(EdgelmError, match=r"--max-bytes.* [0-9]+ .*[0-9]+"):
        edgelm_export.export(checkpoint, tmp_path / "none", **options, max_bytes=others + 9000)
    with pytest.raises(EdgelmError, match=r"--max-bytes.* [0-9]+"):
        edgelm_export.export(checkpoint, tmp_path / "none", **options, max_bytes=1000)
    assert not (tmp_path / "none").exists()


def test_matrices_are_upgraded_until_max_kl_is_met(texts, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(**SHAPE)
    verify = texts / "verify.txt"
    plain = edgelm_export.export(checkpoint, tmp_path / "int4", verify=verify).manifest
    limit = plain.quality["kl_mean"] / 4
    bundle = edgelm_export.export(
        checkpoint, tmp_path / "better", calibrate=texts / "calibrate.txt", method="clip", verify=verify, max_kl=limit
    )
    assert bundle.manifest.quality["kl_mean"] <= limit
    assert plain.bits_per_weight < bundle.manifest.bits_per_weight < 8.5
    with pytest.raises(EdgelmError, match=r"--max-kl .*1e-09"):
        edgelm_export.export(checkpoint, tmp_path / "none", verify=verify, max_kl=1e-9)
    with pytest.raises(EdgelmError, match=r"--min-agreement .*1\.0"):
        edgelm_export.export(checkpoint, tmp_path / "none", verify=verify, min_agreement=1.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["better", "int4"]


def test_the_outline_equals_the_written_bundle(texts, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(**SHAPE, tied=False)
    for options in ({}, {"quant": "fp32"}, {"quant": "mixed", "calibrate": texts / "calibrate.txt"}):
        outline = edgelm_export.outline(checkpoint, **options)
        bundle = edgelm_export.export(checkpoint, tmp_path / "out", **options, force=True)
        stored = {matrix.name: (matrix.bits, matrix.block_size, matrix.bytes()) for matrix in outline.matrices}
        assert stored == {m.name: (m.bits, m.block_size, m.bytes()) for m in bundle.manifest.matrices}
        assert outline.bits_per_weight == bundle.manifest.bits_per_weight
        assert abs(bundle.bytes - outline.bytes) <= 512
        assert (outline.kl is not None) is ("calibrate" in options)


def test_the_same_input_gives_the_same_bytes(texts, tiny_checkpoint, tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install 'edgelm[report]'")
    options = {
        "calibrate": texts / "calibrate.txt",
        "verify": texts / "verify.txt",
        "quant": "mixed",
        "vocab": texts / "calibrate.txt",
        "vocab_size": 310,
        "report": True,
    }
    made = [edgelm_export.export(tiny_checkpoint(**SHAPE), tmp_path / name, **options) for name in ("one", "two")]
    assert contents(made[0].path) == contents(made[1].path)
    assert set(made[0].manifest.files) >= {"report.svg", "vocabulary.json"}


def test_the_report_shows_every_matrix(texts, tiny_checkpoint, tmp_path):
    pytest.importorskip("matplotlib", reason="needs pip install 'edgelm[report]'")
    bundle = edgelm_export.export(tiny_checkpoint(layers=3, tied=False), tmp_path / "out", report=True)
    drawn = (bundle.path / "report.svg").read_text("utf-8")
    for word in ("embedding", "head", "qkv", "gate_up", "down", "output", "layer"):
        assert f"<!-- {word}" in drawn
    without = edgelm_export.export(tiny_checkpoint(layers=3, tied=False), tmp_path / "plain")
    assert "report.svg" not in without.manifest.files


def test_a_pruned_vocabulary_gives_the_same_logits(texts, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(**SHAPE)
    text = (texts / "calibrate.txt").read_text("utf-8")
    whole = edgelm_export.export(checkpoint, tmp_path / "whole", quant="fp32")
    small = edgelm_export.export(
        checkpoint, tmp_path / "small", quant="fp32", vocab=texts / "calibrate.txt", vocab_size=315
    )
    facts = small.manifest.vocabulary
    assert (facts["tokens_before"], facts["tokens"], small.manifest.vocab_size) == (331, 315, 315)
    assert facts["saved_bytes"] == (331 - 315) * 64 * 4
    kept = json.loads((small.path / "vocabulary.json").read_text("utf-8"))
    with edgelm.load(whole.path, threads=1) as first, edgelm.load(small.path, threads=1) as second:
        assert second.manifest.eos_tokens == (kept.index(1),)
        for sentence in text.split("\n")[:3]:
            ids = second.tokenizer.encode(sentence)
            old = [kept[token] for token in ids]
            want = first.worker.call(lambda e, o=old: e.runner.prefill(0, np.array(o), 0, all_logits=True).copy())
            got = second.worker.call(lambda e, i=ids: e.runner.prefill(0, np.array(i), 0, all_logits=True).copy())
            np.testing.assert_allclose(got, want[:, kept], rtol=0, atol=1e-4)
    measured = edgelm_export.compare(small.path, checkpoint, texts / "verify.txt")
    assert measured["kl_mean"] < 1e-9


def test_bad_texts_are_refused_and_leave_nothing(texts, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(**SHAPE)
    short, empty, binary = (tmp_path / name for name in ("short.txt", "empty.txt", "binary.txt"))
    short.write_text("Too short.", encoding="utf-8")
    empty.write_text("\n \n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.iterdir())
    good = str(texts / "verify.txt")
    for options, message in (
        ({"calibrate": short}, "--calibrate: .*[0-9]+ tokens.* 512"),
        ({"calibrate": empty}, "--calibrate: .*empty.txt"),
        ({"calibrate": binary}, "--calibrate: .*binary.txt.*UTF-8"),
        ({"calibrate": tmp_path / "none.txt"}, "--calibrate: .*none.txt"),
        ({"verify": tmp_path / "none.txt"}, "--verify: .*none.txt"),
        ({"verify": empty}, "--verify: .*empty.txt"),
        ({"vocab": empty, "vocab_size": 300}, "--vocab: .*empty.txt"),
        ({"vocab": good, "vocab_size": 9}, " 9 "),
        ({"adapter": tmp_path}, "adapter_config.json"),
    ):
        with pytest.raises(EdgelmError, match=message):
            edgelm_export.export(checkpoint, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_reference_with_another_vocabulary_is_refused(texts, tiny_checkpoint, export_to_cache):
    bundle = export_to_cache(tiny_checkpoint(**SHAPE))
    with pytest.raises(EdgelmError, match=r"331.*400|400.*331"):
        edgelm_export.compare(bundle, tiny_checkpoint(vocab=400), texts / "verify.txt")


def test_calibration_on_self_generated_text(stories_checkpoint, stories_texts, tmp_path):
    dev = stories_texts / "dev.txt"
    plain = edgelm_export.export(stories_checkpoint, tmp_path / "clip", quant="int4", fast=True, verify=dev)
    texts = {"a": {}, "b": {"calibrate": "self"}}
    made = [edgelm_export.export(stories_checkpoint, tmp_path / name, verify=dev, **texts[name]) for name in "ab"]
    assert made[0].manifest.quality["kl_mean"] < 0.7 * plain.manifest.quality["kl_mean"]
    assert contents(made[0].path) == contents(made[1].path)
    assert sorted(path.name for path in made[0].path.iterdir()) == sorted([*made[0].manifest.files, "manifest.json"])


def test_self_generated_documents_start_with_bos_and_have_no_end_tokens(tiny_checkpoint):
    for bos in (True, False):
        model = open_source_model(tiny_checkpoint(bos=bos, tied=False))
        documents = sample_calibration_documents(model, 40, lambda _what, _done, _of: None, None)
        assert len(documents) == 96
        assert {len(document) for document in documents} == {40}
        assert len({tuple(document[1:]) for document in documents}) > 90
        assert all(document.min() >= 0 and document.max() < 331 for document in documents)
        assert not any(1 in document[1:] for document in documents)  # the end token
        first = {int(document[0]) for document in documents}
        assert len(first) > 20
        assert sum(document[0] == 0 for document in documents) >= 48 * bos  # every second one starts with bos
