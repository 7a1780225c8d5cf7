"""Files of real checkpoints: which weights are read, and wrong content in place of a file."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
from edgelm_export.checkpoint import open_checkpoint
from tiny import TinyLlama, save_tensors, write_json

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import CheckpointError, EdgelmError

NAME = "model.embed_tokens.weight"
SHAPE = TinyLlama().tensors()[NAME].shape
STALE = {"metadata": {}, "weight_map": {NAME: "model-00001-of-00002.safetensors"}}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 538090408\n"
PAGES = [
    b"<!DOCTYPE html>\n<html class=''><head><title>Sign in</title>",
    b"\xef\xbb\xbf  \n<html lang=en>",
    b'<?xml version="1.0"?><!DOCTYPE html PUBLIC "x"><html xmlns="y">',
]


@pytest.fixture
def checkpoint(tmp_path):
    return TinyLlama().write(tmp_path / "checkpoint")


def other_weights(folder, name):
    """A file of the same tensors with other values."""
    from safetensors.numpy import save_file

    save_file({key: value + 1 for key, value in TinyLlama().tensors().items()}, folder / name)


def embedding(folder):
    return open_checkpoint(folder).tensor(NAME, SHAPE)


@pytest.mark.parametrize("shards", [False, True], ids=["without the shards", "with the shards"])
def test_a_single_file_beside_a_stale_index(checkpoint, shards):
    write_json(checkpoint / "model.safetensors.index.json", STALE)
    if shards:
        other_weights(checkpoint, "model-00001-of-00002.safetensors")
        other_weights(checkpoint, "model-00002-of-00002.safetensors")
    assert np.array_equal(embedding(checkpoint), TinyLlama().tensors()[NAME])


@pytest.mark.parametrize(
    "name",
    ["model_before_dpo.safetensors", "training_state.safetensors", "zzz.safetensors", "adapter_model.safetensors"],
)
def test_other_files_than_the_models_are_not_read(checkpoint, name):
    other_weights(checkpoint, name)
    assert np.array_equal(embedding(checkpoint), TinyLlama().tensors()[NAME])


def test_shards_are_those_of_the_index(tmp_path):
    checkpoint = TinyLlama(shards=3).write(tmp_path / "c")
    other_weights(checkpoint, "model-00001-of-00002.safetensors")
    assert np.array_equal(embedding(checkpoint), TinyLlama().tensors()[NAME])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model_before_dpo.safetensors", r"model\.safetensors.* model_before_dpo\.safetensors.*rename"),
        (
            "weights.safetensors",
            r" weights\.safetensors.* model\.safetensors.* model\.safetensors\.index\.json",
        ),
        (
            "model-00001-of-00001.safetensors",
            r" model-00001-of-00001\.safetensors.* model\.safetensors\.index\.json",
        ),
        ("adapter_model.safetensors", r"LoRA adapter.*--adapter"),
        ("pytorch_model.bin", r"\*\.safetensors.*pickled"),
    ],
)
def test_the_error_for_weights_with_another_name_lists_the_expected_names(checkpoint, name, message):
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(checkpoint)


def test_all_missing_shards_are_counted(tmp_path):
    checkpoint = TinyLlama(shards=3).write(tmp_path / "c")
    for i in (2, 3):
        (checkpoint / f"model-0000{i}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.*2 of 3") as raised:
        open_checkpoint(checkpoint)
    assert "\n" not in str(raised.value)


FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("name", [*FILES, "special_tokens_map.json", "chat_template.jinja", "chat_template.json"])
def test_a_git_lfs_pointer_is_named(checkpoint, name):
    (checkpoint / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull") as raised:
        open_checkpoint(checkpoint)
    assert str(checkpoint / name) in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_named_pipe_does_not_block(checkpoint, name):
    """An archive may hold one."""
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(CheckpointError):
        open_checkpoint(checkpoint)


def test_a_pointer_in_the_place_of_an_index_or_a_shard(tmp_path):
    for name in ("model.safetensors.index.json", "model-00002-of-00003.safetensors"):
        checkpoint = TinyLlama(shards=3).write(tmp_path / name)
        (checkpoint / name).write_bytes(POINTER)
        with pytest.raises(CheckpointError, match=f"{name}.*Git LFS pointer"):
            open_checkpoint(checkpoint)


@pytest.mark.parametrize("content", PAGES)
@pytest.mark.parametrize("name", FILES)
def test_an_html_page_in_place_of_a_file_is_named(checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"HTML page.*download") as raised:
        open_checkpoint(checkpoint)
    assert str(checkpoint / name) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty file"), (b"Entry not found", "'Entry not found'")],
)
@pytest.mark.parametrize("name", FILES)
def test_empty_files_and_messages_are_named(checkpoint, name, content, message):
    (checkpoint / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_pointer_in_an_adapter(checkpoint, name, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_json(
        adapter / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    )
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}.*Git LFS pointer"):
        edgelm_export.export(checkpoint, tmp_path / "out", adapter=adapter)


def test_a_byte_order_mark_is_allowed(checkpoint):
    for name in ("config.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes(b"\xef\xbb\xbf" + (checkpoint / name).read_bytes())
    assert open_checkpoint(checkpoint).config["model_type"] == "llama"


# --- keys that say nothing ---

IDLE = {
    "max_window_layers": None,
    "sliding_window": 4096,
    "pad_token_id": -1,
    "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    "rope_parameters": None,
    "layer_types": ["full_attention"] * 2,
    "attention_bias": None,
    "mlp_bias": None,
    "head_dim": None,
    "hidden_act": None,
    "quantization_config": None,
    "partial_rotary_factor": None,
    "rope_interleaved": False,
    "rms_norm_eps": 1e-5,
    "pretraining_tp": 1,
}


@pytest.mark.parametrize("name", IDLE)
def test_a_key_without_effect_changes_nothing(name, checkpoint, tmp_path):
    for out, changes in (("plain", {}), ("idle", {name: IDLE[name]})):
        write_json(checkpoint / "config.json", {**TinyLlama().config(), **changes})
        edgelm_export.export(checkpoint, tmp_path / out, quant="fp32")
    plain, idle = (open_bundle(tmp_path / out).manifest for out in ("plain", "idle"))
    assert idle == plain


@pytest.mark.parametrize("value", [-1, 331, 100_000, None])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_padding_token_without_a_row_is_ignored(value, file, checkpoint, tmp_path):
    base = TinyLlama().config() if file == "config.json" else {}
    write_json(checkpoint / file, {**base, "pad_token_id": value})
    corpus = tmp_path / "text"
    corpus.write_text("Once upon a time there was a little girl. " * 30)
    edgelm_export.export(checkpoint, tmp_path / "out", vocab=corpus, vocab_size=300)
    assert open_bundle(tmp_path / "out").manifest.vocab_size == 300


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": True, "temperature": None}, (1.0, 50, 1.0, 0.0)),
        ({"do_sample": True}, (1.0, 50, 1.0, 0.0)),
        ({"do_sample": True, "top_k": None, "top_p": None, "min_p": None}, (1.0, 0, 1.0, 0.0)),
        ({"do_sample": True, "temperature": 0.6, "top_k": -1, "top_p": 0.9}, (0.6, 0, 0.9, 0.0)),
        ({"do_sample": False, "temperature": 0.6, "top_p": None}, (0.0, 0, 1.0, 0.0)),
        (
            {"do_sample": None, "temperature": None, "repetition_penalty": None, "max_new_tokens": None},
            (0.0, 0, 1.0, 0.0),
        ),
    ],
)
def test_sampling_that_is_null_is_off(generation, expected, checkpoint, tmp_path):
    write_json(checkpoint / "generation_config.json", generation)
    edgelm_export.export(checkpoint, tmp_path / "out", quant="fp32")
    sampling = open_bundle(tmp_path / "out").manifest.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == expected


@pytest.mark.parametrize("changes", [{"sliding_window": 100}, {"max_window_layers": -1, "model_type": "qwen2"}])
def test_options_that_change_results_are_refused(changes, checkpoint, tmp_path):
    write_json(checkpoint / "config.json", {**TinyLlama().config(), **changes})
    with pytest.raises(EdgelmError, match=next(iter(changes))):
        edgelm_export.export(checkpoint, tmp_path / "out")
    assert json.loads((checkpoint / "config.json").read_text())
    save_tensors(checkpoint, TinyLlama().tensors())
