"""Code in an untrusted checkpoint is never run: Python files, pickles, or a repository that it names."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest

from edgelm.errors import CheckpointError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from edgelm_export.checkpoint.transformers_config import CODE_FIELDS, SAFE_LOAD_OPTIONS, read_safe_config  # noqa: E402
from edgelm_export.distill.student import load_transformers_model  # noqa: E402

REPO = Path(__file__).resolve().parents[2]
MODULE = "own.py"


@pytest.fixture
def mark(tmp_path):
    """A file that exists after code of the checkpoint has run."""
    return tmp_path / "it-ran"


@pytest.fixture
def hostile(tmp_path, tiny_checkpoint, mark, monkeypatch):
    """A checkpoint of a known type with code beside it; its directory is the current one."""
    path = shutil.copytree(tiny_checkpoint(), tmp_path / "hostile")
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (path / MODULE).write_text(code)
    monkeypatch.chdir(path)
    return path


def change(path, **fields):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


AUTO_MAP = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
FIELDS = [
    {"auto_map": AUTO_MAP},
    {"_attn_implementation_internal": "stranger/repository"},
    {"_attn_implementation": "stranger/repository"},
    {"attn_implementation": "stranger/repository"},
    {"transformers_weights": "../other.safetensors"},
    {"_name_or_path": "stranger/repository", "name_or_path": "stranger/repository"},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: next(iter(fields)))
def test_fields_that_name_code_are_removed(hostile, mark, fields, monkeypatch):
    monkeypatch.setattr(transformers.modeling_utils, "load_and_register_kernel", lambda *_: mark.touch())
    monkeypatch.setattr(transformers.modeling_utils, "is_kernel", lambda name: name is not None and "/" in name)
    change(hostile, **fields)
    config = read_safe_config(transformers, hostile)
    for name in fields:
        assert "repository" not in str(getattr(config, name, None))
    assert load_transformers_model(hostile, "teacher").config._attn_implementation == "eager"
    assert not mark.exists()


def test_such_fields_are_removed_at_any_depth(hostile):
    change(hostile, text_config=[{"auto_map": AUTO_MAP, "_attn_implementation": "a/b", "kept": 1}])
    assert read_safe_config(transformers, hostile).text_config == [{"kept": 1}]


def test_an_architecture_that_exists_only_as_code_in_the_checkpoint_is_refused(hostile, mark):
    change(hostile, model_type="own", auto_map=AUTO_MAP, architectures=["M"])
    with pytest.raises(CheckpointError, match=r"model_type 'own'.*transformers"):
        load_transformers_model(hostile, "teacher")
    assert not mark.exists()


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("named", ["alone", "in the index", "an adapter"])
def test_pickled_weights_are_refused(hostile, mark, named):
    bomb = pickle.dumps(Bomb(mark))
    if named == "an adapter":
        (hostile / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "stranger/repository"}))
        (hostile / "adapter_model.bin").write_bytes(bomb)
    else:
        for file in hostile.glob("*.safetensors"):
            file.unlink()
        (hostile / "pytorch_model.bin").write_bytes(bomb)
        if named == "in the index":
            index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}}
            (hostile / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"pickled|cannot be read|adapter_config"):
        load_transformers_model(hostile, "student")
    assert not mark.exists()


def test_an_export_via_optimum_runs_no_code_of_a_checkpoint(hostile, mark, tmp_path, capsys):
    pytest.importorskip("optimum.exporters.onnx", reason="needs pip install 'edgelm[optimum]'")
    from edgelm.cli import main

    change(hostile, auto_map=AUTO_MAP, _attn_implementation_internal="stranger/repository")
    assert main(["export", str(hostile), str(tmp_path / "out"), "--via", "optimum", "--quant", "fp32"]) == 0
    change(hostile, model_type="own")
    assert main(["export", str(hostile), str(tmp_path / "out"), "--via", "optimum", "--force"]) == 1
    assert "internal error" not in capsys.readouterr().err
    assert not mark.exists()


def test_every_loading_call_has_safe_options():
    """Every `from_pretrained` and `torch.load` must have options that prevent running code."""
    found = 0
    for folder in ("edgelm", "export", "devices", "examples"):
        for file in (REPO / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if node.func.attr == "from_pretrained":
                    assert words.get(None) == "SAFE_LOAD_OPTIONS", f"{file}:{node.lineno}"
                    assert words.get("config") == "config", f"{file}:{node.lineno}"
                    found += 1
                elif ast.unparse(node.func) in ("torch.load", "np.load", "pickle.load", "pickle.loads"):
                    assert words.get("weights_only") == "True", f"{file}:{node.lineno}"
                    found += 1
    assert found == 3
    assert SAFE_LOAD_OPTIONS == {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
    assert "auto_map" in CODE_FIELDS
