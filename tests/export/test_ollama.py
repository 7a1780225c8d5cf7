"""Models of a local Ollama store, laid out as Ollama does."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from edgelm_export.checkpoint import metadata, open_checkpoint
from gguf_files import write_gguf
from tiny import CHAT_TEMPLATE, TinyLlama, tokenizer_json

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import CheckpointError

IMAGE = "application/vnd.ollama.image."


class Store:
    """A store in a folder; `pull` adds a model."""

    def __init__(self, root):
        self.root = root
        (root / "blobs").mkdir(parents=True)

    def blob(self, content, kind):
        digest = hashlib.sha256(content).hexdigest()
        (self.root / "blobs" / f"sha256-{digest}").write_bytes(content)
        return {"mediaType": IMAGE + kind, "digest": f"sha256:{digest}", "size": len(content)}

    def pull(self, model, *, name="registry.ollama.ai/library/tiny/latest", **layers):
        found = [self.blob(model, "model"), *(self.blob(content, kind) for kind, content in layers.items())]
        return self.manifest(name, {"schemaVersion": 2, "layers": found})

    def manifest(self, name, content):
        file = self.root / "manifests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    shape, path = TinyLlama(), tmp_path_factory.mktemp("gguf") / "model.gguf"
    chat = {"tokenizer.chat_template": CHAT_TEMPLATE}
    return write_gguf(path, shape.config(), shape.tensors(), tokenizer=tokenizer_json(), metadata=chat).read_bytes()


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    return Store(tmp_path / "models")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("registry.ollama.ai/library/tiny/latest", "ollama:tiny"),
        ("registry.ollama.ai/library/tiny/0.5b", "ollama:tiny:0.5b"),
        ("registry.ollama.ai/someone/tiny/latest", "ollama:someone/tiny"),
        ("hf.co/someone/tiny-GGUF/Q4_0", "ollama:hf.co/someone/tiny-GGUF:Q4_0"),
        ("localhost:5000/someone/tiny/latest", "ollama:localhost:5000/someone/tiny"),
    ],
)
def test_a_model_is_found_by_its_name(name, source, store, model):
    store.pull(model, name=name)
    assert open_checkpoint(source).config["model_type"] == "llama"


def test_the_whole_export(store, model, tmp_path, run):
    parameters = {"stop": ["<|stop|>", "</s>"], "temperature": 0.6, "top_k": 30, "num_ctx": 8192, "num_predict": -1}
    store.pull(model, params=json.dumps(parameters).encode(), template=b"{{ .Prompt }}", system=b"Be short.")
    code, printed, _ = run("export", "ollama:tiny", tmp_path / "out", "--quant", "int8")
    assert code == 0
    assert "llama" in printed
    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.chat_template == CHAT_TEMPLATE
    assert manifest.eos_tokens == (1,)
    assert manifest.sampling.stop == ("<|stop|>",)  # the other one is a token
    assert (manifest.sampling.temperature, manifest.sampling.top_k) == (0.6, 30)
    assert manifest.sampling.max_tokens == 256


@pytest.mark.parametrize(
    "parameters", [{"stop": "x"}, {"stop": [1]}, {"temperature": "hot"}, {"top_k": []}, []], ids=str
)
def test_parameters_of_a_wrong_type_are_one_error(parameters, store, model):
    store.pull(model, params=json.dumps(parameters).encode())
    with pytest.raises(CheckpointError):
        metadata.sampling(open_checkpoint("ollama:tiny"))


def test_the_users_own_store_is_searched(tmp_path, monkeypatch, model):
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    Store(tmp_path / ".ollama" / "models").pull(model)
    assert open_checkpoint("ollama:tiny").names


def test_a_missing_model_lists_what_is_there(store, model):
    with pytest.raises(CheckpointError, match="models"):
        open_checkpoint("ollama:tiny")
    for name in ("registry.ollama.ai/library/tiny/latest", "registry.ollama.ai/me/other/1b", "hf.co/a/b/Q8_0"):
        store.pull(model, name=name)
    with pytest.raises(CheckpointError, match=r"hf\.co/a/b:Q8_0, me/other:1b, tiny:latest$"):
        open_checkpoint("ollama:nothing:7b")


@pytest.mark.parametrize(
    "source",
    [
        *("ollama:", "ollama:../../etc/passwd", "ollama:a/../b", "ollama:..", "ollama:a:..", "ollama:a/b/c/d"),
        *("ollama:/a", "ollama:a\x00b", "ollama:a b", "ollama:a:b:c", "ollama:" + "a" * 5000, "ollama:.hidden"),
    ],
)
def test_no_name_leads_out_of_the_store(source, store):
    with pytest.raises(CheckpointError, match="ollama:NAME:TAG"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    "digest",
    ["sha256:../../../../etc/passwd", "sha256:" + "a" * 63, "md5:" + "a" * 64, None, ["sha256:" + "a" * 64]],
)
def test_no_digest_leads_out_of_the_store(digest, store):
    layers = [{"mediaType": IMAGE + "model", "digest": digest, "size": 5}]
    store.manifest("registry.ollama.ai/library/tiny/latest", {"layers": layers})
    with pytest.raises(CheckpointError, match="SHA-256"):
        open_checkpoint("ollama:tiny")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", "{}", '{"layers": 5}', '{"layers": [5]}', '{"layers": []}', "\x00", '"' + "x" * 2**21]
)
def test_a_damaged_manifest_is_named(content, store):
    store.manifest("registry.ollama.ai/library/tiny/latest", content)
    with pytest.raises(CheckpointError):
        open_checkpoint("ollama:tiny")


def test_missing_and_truncated_blobs_are_named(store, model):
    store.pull(model)
    (blob,) = (store.root / "blobs").iterdir()
    os.truncate(blob, 1000)
    with pytest.raises(CheckpointError, match=r"1000 bytes"):
        open_checkpoint("ollama:tiny")
    blob.unlink()
    with pytest.raises(CheckpointError, match=r"missing.*ollama pull"):
        open_checkpoint("ollama:tiny")


def test_an_adapter_and_a_missing_model_are_refused(store, model):
    store.pull(model, adapter=b"x")
    with pytest.raises(CheckpointError, match="GGUF"):
        open_checkpoint("ollama:tiny")
    store.manifest("registry.ollama.ai/library/tiny/latest", {"layers": [store.blob(b"x", "license")]})
    with pytest.raises(CheckpointError, match="GGUF"):
        open_checkpoint("ollama:tiny")
