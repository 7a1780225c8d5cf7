"""Bad checkpoints: one line with the cause, exit code 1, and no files left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
from tiny import TinyLlama, save_tensors, tokenizer_json, write_json

import edgelm
from edgelm.bundle.bundle_folder import open_bundle, write_manifest
from edgelm.cli import main


@pytest.fixture
def checkpoint(tmp_path):
    return TinyLlama().write(tmp_path / "checkpoint")


@pytest.fixture(autouse=True)
def _keep_handlers():
    """Restore the handler of SIGTERM, which the command replaces for the rest of its process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def refusal(source, capsys, *options):
    """Export, expect failure without files left; return the error line."""
    home = source.parent
    before = sorted(str(path) for path in home.rglob("*"))
    code = main(["export", str(source), str(home / "new" / "out"), *options])
    printed = capsys.readouterr()
    assert code == 1
    assert printed.out == ""
    assert printed.err.startswith("edgelm export: ")
    assert printed.err.count("\n") == 1, printed.err
    assert "internal error" not in printed.err
    assert sorted(str(path) for path in home.rglob("*")) == before
    return printed.err


def reconfigure(checkpoint, **changes):
    write_json(checkpoint / "config.json", {**json.loads((checkpoint / "config.json").read_text()), **changes})


def replace_tensors(checkpoint, change):
    tensors = TinyLlama().tensors()
    change(tensors)
    save_tensors(checkpoint, tensors)


def test_no_directory(tmp_path, capsys):
    assert "does not exist" in refusal(tmp_path / "nowhere", capsys)


def test_a_hub_id_that_cannot_be_fetched(tmp_path):
    command = [sys.executable, "-m", "edgelm", "export", "nobody/nothing", str(tmp_path / "new" / "out")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "nobody/nothing" in done.stderr
    assert "internal error" not in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(missing, checkpoint, capsys):
    (checkpoint / missing).unlink()
    assert ("*.safetensors" if "model" in missing else missing) in refusal(checkpoint, capsys)


def test_a_file_instead_of_a_directory(checkpoint, capsys):
    assert "is a file" in refusal(checkpoint / "config.json", capsys)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000], ids=["cut", "list", "bytes", "deep"])
def test_broken_json_is_named(name, content, checkpoint, capsys):
    (checkpoint / name).write_bytes(content)
    assert name in refusal(checkpoint, capsys)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"model": {"type": "BPE"}}'], ids=["cut", "empty", "partial"])
def test_a_broken_tokenizer_is_named(content, checkpoint, capsys):
    (checkpoint / "tokenizer.json").write_bytes(content)
    assert "tokenizer.json" in refusal(checkpoint, capsys)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named(name, checkpoint, capsys):
    replace_tensors(checkpoint, lambda tensors: tensors.pop(name))
    assert name in refusal(checkpoint, capsys)


def test_the_error_for_a_wrong_shape_has_both_shapes(checkpoint, capsys):
    name = "model.layers.0.mlp.down_proj.weight"
    replace_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    line = refusal(checkpoint, capsys)
    assert name in line
    assert "[96, 64]" in line
    assert "[64, 96]" in line


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_numbers(value, name, checkpoint, capsys):
    def poison(tensors):
        tensors[name].flat[-1] = value

    replace_tensors(checkpoint, poison)
    assert name in refusal(checkpoint, capsys, "--quant", "int8")


def test_integer_weights(checkpoint, capsys):
    from safetensors.numpy import save_file

    tensors = TinyLlama().tensors()
    tensors["model.norm.weight"] = np.ones(64, np.int32)
    save_file(tensors, checkpoint / "model.safetensors")
    assert "I32" in refusal(checkpoint, capsys)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(keep, checkpoint, capsys):
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert "model.safetensors" in refusal(checkpoint, capsys)


def test_a_missing_shard_is_named(tmp_path, capsys):
    checkpoint = TinyLlama(shards=3).write(tmp_path / "checkpoint")
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in refusal(checkpoint, capsys)


def test_an_index_may_not_lead_out_of_the_directory(tmp_path, capsys):
    checkpoint = TinyLlama(shards=2).write(tmp_path / "checkpoint")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    assert "outside its directory" in refusal(checkpoint, capsys)


@pytest.mark.parametrize("model_type", ["mamba", "gpt2", None, 3, ["llama"], {"a": 1}])
def test_an_unknown_architecture_is_named_with_the_supported_ones(model_type, checkpoint, capsys):
    reconfigure(checkpoint, model_type=model_type)
    line = refusal(checkpoint, capsys)
    assert repr(model_type) in line
    assert re.search(r"supported: .*llama", line)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "mish"},
        {"sliding_window": 128},
        {"quantization_config": {"quant_method": "gptq"}},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "finetuned": True}},
        {"rope_scaling": {"rope_type": "ntk-by-parts", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.5}},
        {"rope_theta": -1},
        {"rope_theta": "10000"},
        {"rms_norm_eps": 0},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 2.5},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"head_dim": 15},
        {"vocab_size": None},
        {"hidden_size": True},
        {"max_position_embeddings": -5},
        {"attention_bias": "no"},
        {"tie_word_embeddings": 2},
        {"bos_token_id": -1},
        {"eos_token_id": 331},
        {"eos_token_id": "</s>"},
    ],
    ids=lambda changes: json.dumps(changes).translate({ord(c): "" for c in '"{} '}),
)
def test_an_option_that_is_not_supported_is_named(changes, checkpoint, capsys):
    reconfigure(checkpoint, **changes)
    line = refusal(checkpoint, capsys)
    ((name, value),) = changes.items()
    assert any(word in line for word in (name, *(value if isinstance(value, dict) else ())))


def test_a_tokenizer_larger_than_the_vocabulary(tmp_path, capsys):
    checkpoint = TinyLlama(vocab=290).write(tmp_path / "checkpoint")
    line = refusal(checkpoint, capsys)
    assert "290" in line
    assert "tokenizer.json" in line


def test_an_added_token_past_the_vocabulary_is_ordinary_text(tmp_path):
    vocab = json.loads(tokenizer_json())["model"]["vocab"]
    checkpoint = TinyLlama(vocab=len(vocab)).write(tmp_path / "checkpoint")
    tokenizer = json.loads(tokenizer_json())
    extra = {**tokenizer["added_tokens"][0], "id": len(vocab), "content": "[PAD]"}
    more = {**extra, "id": len(vocab) + 1, "content": "[MASK]"}
    added = {"added_tokens": [*tokenizer["added_tokens"], extra, more]}
    write_json(checkpoint / "tokenizer.json", {**tokenizer, **added})
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--quant", "fp32"]) == 0
    bare = tokenizers.Tokenizer.from_str(tokenizer_json())
    with edgelm.load(tmp_path / "out", threads=1) as model:
        for text in ("a [PAD]", "[MASK][PAD]", "plain"):
            done = model.generate(text, max_tokens=3, ignore_eos=True, raw=True)
            assert done.usage.prompt_tokens == len(bare.encode(text).ids)
            assert len(model.score(text)) == len(bare.encode(text).ids) - 1
        assert model.generate("a [PAD]", choices=["yes", "no"]).text in ("yes", "no")


def test_an_older_bundle_with_such_a_token_runs_too(tmp_path):
    vocab = json.loads(tokenizer_json())["model"]["vocab"]
    checkpoint = TinyLlama(vocab=len(vocab)).write(tmp_path / "checkpoint")
    edgelm_export.export(checkpoint, tmp_path / "out", quant="fp32")
    tokenizer = json.loads(tokenizer_json())
    extra = {**tokenizer["added_tokens"][0], "id": len(vocab), "content": "[PAD]"}
    write_json(tmp_path / "out" / "tokenizer.json", {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], extra]})
    write_manifest(tmp_path / "out", open_bundle(tmp_path / "out", verify=False).manifest)
    with edgelm.load(tmp_path / "out", threads=1) as model:
        assert model.generate("a [PAD]", choices=["yes", "no"]).text in ("yes", "no")


PADDING = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "</s>"}
LENGTHS = {
    "padding": {"padding": {"strategy": {"Fixed": 60}, **PADDING}},
    "padding to the longest": {"padding": {"strategy": "BatchLongest", **PADDING}},
    "truncation": {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("where", ["checkpoint", "bundle"])
def test_constraints_work_with_padding_or_truncation_left_on(name, where, tmp_path):
    """The answers equal those without: padding and truncation would change the tokens that the grammar forces."""
    checkpoint = TinyLlama(tied=False).write(tmp_path / "checkpoint")
    asked = {"prompt": "Turn", "choices": ["the kitchen light", "the dog in the park"], "max_tokens": 40}
    answers = []
    for changes in ({}, LENGTHS[name]):
        changed = {**json.loads(tokenizer_json()), **changes}
        out = tmp_path / f"out{len(answers)}"
        if where == "checkpoint":
            write_json(checkpoint / "tokenizer.json", changed)
        edgelm_export.export(checkpoint, out, quant="fp32")
        if where == "bundle":
            write_json(out / "tokenizer.json", changed)
            write_manifest(out, open_bundle(out, verify=False).manifest)
        with edgelm.load(out, threads=1) as model:
            done = model.generate(**asked)
            answers.append((done.text, done.tokens, done.usage, list(model.score("the cat"))))
    assert answers[0][0] in asked["choices"]
    assert answers[1] == answers[0]


def test_an_existing_target_is_refused(checkpoint, capsys):
    out = checkpoint.parent / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    assert main(["export", str(checkpoint), str(out)]) == 1
    assert "--force" in capsys.readouterr().err
    assert main(["export", str(checkpoint), str(out), "--force"]) == 1
    assert "remove it by hand" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_target_below_a_file(checkpoint, capsys):
    assert main(["export", str(checkpoint), str(checkpoint / "config.json" / "out")]) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "internal error" not in printed


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_export_leaves_nothing(sent, tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint(hidden=512, mlp=2048, layers=12, heads=8, kv_heads=8)
    command = [sys.executable, "-m", "edgelm", "export", str(checkpoint), str(tmp_path / "new" / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not any(path.stat().st_size > 1 << 20 for path in tmp_path.rglob("model.onnx.data")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
        os.kill(process.pid, sent)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert err == "edgelm export: interrupted\n"
    assert not list(tmp_path.iterdir())
