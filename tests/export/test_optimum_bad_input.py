"""Errors of `--via optimum`: one line, and no files left."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path

import edgelm_export
import pytest
from foreign_models import CONTEXT, model_of, torch, write
from safetensors.numpy import load_file, save_file
from tiny import write_json

from edgelm.errors import CheckpointError, EdgelmError, MissingExtraError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(model_of("gpt2"), tmp_path_factory.mktemp("checkpoint") / "gpt2")


def refuse(source: Path, tmp_path: Path, error: type[EdgelmError], match: str, **options) -> None:
    """Expect an error of one line, and no files left."""
    target = tmp_path / "out"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match) as caught:
        edgelm_export.export(source, target, via="optimum", **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def edited(source: Path, target: Path, **config) -> Path:
    """Copy a checkpoint with another config.json."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    write_json(target / "config.json", {**json.loads((source / "config.json").read_text("utf-8")), **config})
    return target


def test_an_architecture_that_optimum_does_not_know(checkpoint, tmp_path):
    source = edited(checkpoint, tmp_path / "model", model_type="hyena")
    refuse(source, tmp_path, CheckpointError, "'hyena'.*gpt2.*opt")


def test_a_missing_tensor_is_named(checkpoint, tmp_path):
    source = edited(checkpoint, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refuse(source, tmp_path, CheckpointError, r"no tensor transformer\.h\.1\.mlp\.c_fc\.weight")


def test_a_tensor_of_another_shape(checkpoint, tmp_path):
    source = edited(checkpoint, tmp_path / "model", n_positions=CONTEXT + 1)
    refuse(source, tmp_path, CheckpointError, "transformers cannot load|another shape for transformer.wpe.weight")


@pytest.mark.parametrize(
    "bad", [("h.1.mlp.c_proj.weight", "inf"), ("h.0.ln_2.weight", "nan")], ids=lambda each: each[1]
)
@pytest.mark.parametrize("quant", ["fp32", "int4"])
def test_weights_that_are_no_numbers(bad, quant, tmp_path):
    model = deepcopy(model_of("gpt2"))
    name, number = bad
    with torch.no_grad():
        model.transformer.get_parameter(name).view(-1)[5] = float(number)
    refuse(write(model, tmp_path / "model"), tmp_path, CheckpointError, "NaN", quant=quant)


def test_a_quantized_checkpoint(checkpoint, tmp_path):
    source = edited(checkpoint, tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    refuse(source, tmp_path, CheckpointError, "already quantized")


def test_a_context_past_the_positions(checkpoint, tmp_path):
    refuse(checkpoint, tmp_path, EdgelmError, rf"\[1, {CONTEXT}\].*{CONTEXT + 1}", context=CONTEXT + 1)


@pytest.mark.parametrize("module", ["torch", "optimum.exporters.onnx"])
def test_a_missing_library_names_the_extra(module, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # the same as a missing module for import
    with pytest.raises(MissingExtraError, match=r"\[optimum\]") as caught:
        edgelm_export.export(checkpoint, tmp_path / "out", via="optimum")
    assert caught.value.module == module
    assert not (tmp_path / "out").exists()
