"""Exports: the manifest, the same bytes for the same input, and no other files."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from folder_hashes import contents

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
import onnx
from tiny import TinyLlama, save_tensors, write_json

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import EdgelmError


@pytest.mark.parametrize("quant", ["int4", "int8", "fp32"])
def test_the_same_input_gives_the_same_bytes(quant, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(attention_bias=True, mlp=172, hidden=40, heads=5, kv_heads=1)
    before = contents(checkpoint)
    first = edgelm_export.export(checkpoint, tmp_path / "first", quant=quant)
    second = edgelm_export.export(str(checkpoint), str(tmp_path / "second"), quant=quant)
    assert contents(first.path) == contents(second.path)
    assert first.manifest.digest == second.manifest.digest
    assert contents(checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_shards_and_precisions_of_the_same_weights_give_the_same_graph(tmp_path):
    shape = TinyLlama(dtype="bfloat16")
    shape.write(tmp_path / "bf16")
    rounded = {name: value.astype("bfloat16").astype(np.float32) for name, value in shape.tensors().items()}
    for name, shards in (("one", 1), ("many", 4)):
        TinyLlama(dtype="float32").write(tmp_path / name)
        for file in (tmp_path / name).glob("*.safetensors*"):
            file.unlink()
        save_tensors(tmp_path / name, rounded, shards=shards)
    made = [edgelm_export.export(tmp_path / name, tmp_path / f"{name}-out") for name in ("bf16", "one", "many")]
    data = [contents(bundle.path)["model.onnx.data"] for bundle in made]
    graphs = [contents(bundle.path)["model.onnx"] for bundle in made]
    assert len(set(data)) == len(set(graphs)) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("quant", "block_size"), [("fp32", 32), ("int8", 32), ("int4", 32), ("int4", 64), ("int4", 128)]
)
def test_the_manifest_lists_what_is_stored(quant, block_size, tied, tiny_checkpoint, export_to_cache):
    checkpoint = tiny_checkpoint(tied=tied, hidden=160, heads=5, kv_heads=1, mlp=172, attention_bias=True)
    path = export_to_cache(checkpoint, quant=quant, block_size=block_size)
    manifest = open_bundle(path).manifest
    tensors = TinyLlama(tied=tied, hidden=160, heads=5, kv_heads=1, mlp=172, attention_bias=True).tensors()
    assert manifest.parameters == sum(value.size for value in tensors.values())
    assert manifest.vocab_size == 331
    assert (manifest.context, manifest.quant, manifest.architecture) == (512, quant, "llama")
    assert (manifest.bos_token, manifest.eos_tokens) == (0, (1,))
    assert manifest.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert set(manifest.files) == {"model.onnx", "model.onnx.data", "tokenizer.json"}
    assert {"edgelm", "onnx", "onnxruntime", "numpy"} <= set(manifest.made_with)
    bits = {"fp32": 32, "int8": 8, "int4": 4}[quant]
    assert {matrix.bits for matrix in manifest.matrices if matrix.name not in ("embedding", "head")} == {bits}
    assert {matrix.bits for matrix in manifest.matrices if matrix.name in ("embedding", "head")} == {max(bits, 5)}
    names = {matrix.name for matrix in manifest.matrices}
    assert ("head" in names) is not tied
    # The matrices' bytes equal the data file, except for norms, biases, tables and alignment to pages.
    said = sum(matrix.bytes() for matrix in manifest.matrices)
    assert said <= manifest.files["model.onnx.data"].bytes + manifest.files["model.onnx"].bytes <= said * 1.1 + 400_000


def test_a_tied_embedding_is_stored_once(tiny_checkpoint, export_to_cache):
    sizes = {}
    for tied in (True, False):
        checkpoint = tiny_checkpoint(tied=tied, vocab=4001, hidden=128)
        sizes[tied] = open_bundle(export_to_cache(checkpoint, quant="int4", embedding_bits=4)).bytes
    head = 4001 * (128 // 2 + 2 * 128 // 32)  # codes, and a float16 scale per block
    assert sizes[False] - sizes[True] == pytest.approx(head, abs=3 * 4096)


@pytest.mark.parametrize("quant", ["int4", "int8", "fp32"])
def test_the_graph_holds_nothing_unused_no_float64_and_one_data_file(quant, tiny_checkpoint, export_to_cache):
    path = export_to_cache(tiny_checkpoint(tied=False), quant=quant)
    graph = onnx.load(path / "model.onnx", load_external_data=False)
    assert all(tensor.data_type != onnx.TensorProto.DOUBLE for tensor in graph.graph.initializer)
    assert {tensor.name for tensor in graph.graph.initializer} <= {
        name for node in graph.graph.node for name in node.input
    }
    stored = {entry.value for t in graph.graph.initializer for entry in t.external_data if entry.key == "location"}
    assert stored == {"model.onnx.data"}


def test_generation_config_gives_defaults_and_end_tokens(tiny_checkpoint, tmp_path):
    checkpoint = TinyLlama().write(tmp_path / "checkpoint")
    write_json(
        checkpoint / "generation_config.json",
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 7], "repetition_penalty": 1.1},
    )
    manifest = edgelm_export.export(checkpoint, tmp_path / "out").manifest
    assert manifest.eos_tokens == (1, 7)
    assert (manifest.sampling.temperature, manifest.sampling.top_p, manifest.sampling.top_k) == (0.6, 0.9, 50)
    assert manifest.sampling.repetition_penalty == 1.1
    write_json(checkpoint / "generation_config.json", {"stop_strings": ["###", "[user]"]})
    assert edgelm_export.export(checkpoint, tmp_path / "stops").manifest.sampling.stop == ("###", "[user]")
    write_json(checkpoint / "generation_config.json", {"temperature": 0.6})  # without do_sample it is greedy
    assert edgelm_export.export(checkpoint, tmp_path / "greedy").manifest.sampling.temperature == 0


def test_the_chat_template_is_part_of_the_bundle(tmp_path):
    checkpoint = TinyLlama().write(tmp_path / "checkpoint")
    (checkpoint / "chat_template.jinja").write_text(
        "{{ messages[0].content }}!"
    )  # takes precedence, as in transformers
    bundle = edgelm_export.export(checkpoint, tmp_path / "out", quant="fp32")
    assert bundle.manifest.chat_template == "{{ messages[0].content }}!"
    with edgelm.load(bundle.path, threads=1) as model:
        said = model.generate(messages=[{"role": "user", "content": "The cat"}], max_tokens=4, ignore_eos=True)
        ids = model.tokenizer.encode("The cat!", add_special_tokens=False)
        assert said.tokens == model.generate(tokens=ids, max_tokens=4, ignore_eos=True).tokens


def test_the_context_is_the_given_one(tiny_checkpoint, export_to_cache, tmp_path):
    path = export_to_cache(tiny_checkpoint(), quant="fp32", context=48)
    with edgelm.load(path, threads=1) as model:
        assert model.manifest.context == 48
        assert len(model.generate(tokens=[5] * 8, max_tokens=1000, ignore_eos=True).tokens) == 40
    for wrong in (0, 513):
        with pytest.raises(EdgelmError, match="512"):
            edgelm_export.export(tiny_checkpoint(), tmp_path / "out", context=wrong)
    assert not list(tmp_path.iterdir())


def test_a_long_context_is_limited_by_default(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(context=32768)
    assert edgelm_export.export(checkpoint, tmp_path / "default").manifest.context == 4096
    assert edgelm_export.export(checkpoint, tmp_path / "asked", context=9000).manifest.context == 9000


def test_force_replaces_a_bundle_and_only_a_bundle(tiny_checkpoint, tmp_path):
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    first = edgelm_export.export(checkpoint, out, quant="int4").manifest
    with pytest.raises(EdgelmError, match="--force"):
        edgelm_export.export(checkpoint, out, quant="fp32")
    assert open_bundle(out).manifest.digest == first.digest
    assert edgelm_export.export(checkpoint, out, quant="fp32", force=True).manifest.quant == "fp32"
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "diary.txt").write_text("dear diary")
    file = tmp_path / "file"
    file.write_text("keep me")
    for precious in (notes, file):
        with pytest.raises(EdgelmError, match="by hand"):
            edgelm_export.export(checkpoint, precious, force=True)
    assert (notes / "diary.txt").read_text() == "dear diary"
    assert file.read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "notes", "out"]


def test_an_empty_directory_and_missing_parents_are_filled(tiny_checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    edgelm_export.export(tiny_checkpoint(), tmp_path / "empty")
    edgelm_export.export(tiny_checkpoint(), tmp_path / "a" / "b" / "c")
    assert open_bundle(tmp_path / "empty").manifest == open_bundle(tmp_path / "a" / "b" / "c").manifest


def test_a_failed_replacement_keeps_the_old_bundle(tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    edgelm_export.export(tiny_checkpoint(), out)
    before = contents(out)
    broken = TinyLlama().write(tmp_path / "broken")
    write_json(broken / "config.json", {**TinyLlama().config(), "num_hidden_layers": 3})
    with pytest.raises(EdgelmError, match=r"model\.layers\.2"):
        edgelm_export.export(broken, out, force=True)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "out"]


def test_progress_counts_the_bytes_of_every_matrix(tiny_checkpoint, tmp_path):
    told = []
    bundle = edgelm_export.export(
        tiny_checkpoint(layers=3),
        tmp_path / "out",
        fast=True,
        progress=lambda what, done, of: told.append((what, done, of)),
    )
    sizes = [matrix.bytes() for matrix in bundle.manifest.matrices]
    assert len(sizes) == 1 + 3 * 4
    assert told[: len(sizes)] == [("quantizing", sum(sizes[:i]), sum(sizes)) for i in range(len(sizes))]
    assert told[-1] == ("self-check: document", 5, 5)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command_prints_what_it_wrote(options, tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "edgelm", "export", str(tiny_checkpoint()), str(tmp_path / "out")]
    command += ["--quant", "int8", "--block-size", "64", "--context", "100", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    bundle = open_bundle(tmp_path / "out")
    assert (bundle.manifest.quant, bundle.manifest.context) == ("int8", 100)
    assert {matrix.block_size for matrix in bundle.manifest.matrices} == {64}
    lines = done.stdout.splitlines()
    if options:
        assert len(lines) == 1
        printed = json.loads(done.stdout)
        assert done.stderr == ""
        assert (printed["bundle"], printed["bytes"]) == (str(bundle.path), bundle.bytes)
        assert printed["digest"] == bundle.manifest.digest
    else:
        assert lines[0].startswith(f"{bundle.path}: llama")
        assert lines[1].startswith("self-check on ")
        assert f"KL {bundle.manifest.self_check['kl_mean']:.4f} nats" in lines[1]
        assert len(lines) == 2
        assert f"edgelm generate {bundle.path}" in done.stderr


def test_info_prints_the_manifest(tiny_checkpoint, export_to_cache, capsys):
    from edgelm.cli import main

    path = export_to_cache(tiny_checkpoint(), quant="int4")
    assert main(["info", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["digest"] == open_bundle(path).manifest.digest
    assert printed["files"]["model.onnx"]["sha256"] == contents(path)["model.onnx"]
