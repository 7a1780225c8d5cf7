"""`edgelm pull` from a local checkpoint, and from a local server with the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")
pytest.importorskip("huggingface_hub", reason="needs pip install 'edgelm[export]'")

import edgelm.cli.pull as command
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.catalogue import CatalogueModel, ModelVariant
from edgelm.bundle.store import BundleStore, Origin

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40


class Hub(BaseHTTPRequestHandler):
    """Answers huggingface_hub's requests for a model's repository: its commit, its list of files, a file."""

    def do_GET(self):
        server = self.server
        path = unquote(self.path.partition("?")[0])
        server.asked.append((self.command, path))
        repository = "/api/models/owner/tiny"
        if path == "/api/models/owner/gated":
            return self.answer(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        if path in (repository, f"{repository}/revision/{COMMIT}", f"{repository}/revision/{OLDER}"):
            names = sorted(file.name for file in server.folder.iterdir())
            sha = OLDER if path.endswith(OLDER) else COMMIT
            body = {"id": "owner/tiny", "sha": sha, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(json.dumps(body).encode())
        for commit in (COMMIT, OLDER):
            name = path.removeprefix(f"/owner/tiny/resolve/{commit}/")
            if name != path and (server.folder / name).is_file():
                if server.fails == name and self.command == "GET":
                    return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
                content = (server.folder / name).read_bytes()
                tag = hashlib.sha256(content).hexdigest()
                return self.answer(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})
        return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, content, status=200, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        """Log nothing."""


@pytest.fixture(scope="module")
def server(tiny_checkpoint):
    """A hub with one model, owner/tiny, for all tests: the library keeps connections to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tiny_checkpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(server, monkeypatch):
    """The server as the library's hub. `asked`: requested paths; `fails`: a file that it does not have."""
    server.asked, server.fails = [], None
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    return server


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELM_DATA_DIR", str(tmp_path / "data"))
    return BundleStore.default()


@pytest.fixture
def known(monkeypatch):
    """A catalogue of one model, with a fixed commit and two variants."""
    variants = (ModelVariant("int8", 1, 4000), ModelVariant("int4", 1, 1000))
    model = CatalogueModel("tiny", "owner/tiny", "MIT", 100_000, "tests", variants, revision=OLDER)
    monkeypatch.setattr(command, "load_catalogue", lambda: {"tiny": model})
    return model


def memory(monkeypatch, mb):
    monkeypatch.setattr(command, "read_memory_mb", lambda: mb)


@pytest.mark.parametrize(("mb", "quant"), [(16_000, "int8"), (4_000, "int4"), (None, "int8")])
def test_the_catalogue_selects_commit_and_precision(hub, store, known, monkeypatch, run, mb, quant):
    memory(monkeypatch, mb)
    code, out, err = run("pull", "tiny")
    assert code == 0, err
    assert out.startswith("tiny: 0.")
    assert f"owner/tiny at {OLDER[:12]}" in err
    assert err.splitlines()[-1] == "next: edgelm chat tiny"
    assert open_bundle("tiny").manifest.quant == quant
    assert store.origin("tiny") == Origin("owner/tiny", OLDER)
    assert not (store.folder / "downloads" / "tiny").exists()
    assert ("GET", f"/owner/tiny/resolve/{OLDER}/model.safetensors") in hub.asked
    asked = len(hub.asked)
    code, out, _ = run("pull", "tiny")
    assert (code, len(hub.asked)) == (0, asked)  # it exists: no request
    assert "--force" in out


def test_a_model_of_the_hub_is_named_after_the_last_part_of_its_id(hub, store, run):
    code, out, err = run("pull", "owner/tiny", "--quant", "int8", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert (facts["name"], facts["quant"], facts["revision"]) == ("tiny", "int8", COMMIT)
    assert store.names() == ["tiny"]


def test_a_board_with_too_little_memory_is_refused_before_the_download(hub, store, known, monkeypatch, run):
    memory(monkeypatch, 900)
    code, out, err = run("pull", "tiny")
    assert (code, out, err.count("\n"), hub.asked) == (1, "", 1, [])
    assert "1000 MB" in err
    assert "900 MB" in err
    code, _, _ = run("pull", "tiny", "--quant", "int8")
    assert code == 0


def test_a_broken_download_leaves_no_bundle_and_continues_later(hub, store, run):
    hub.fails = "model.safetensors"
    code, out, err = run("pull", "owner/tiny", "--fast")
    assert (code, out) == (1, "")
    assert "internal error" not in err
    assert store.names() == []
    hub.fails = None
    before = len(hub.asked)
    code, _, err = run("pull", "owner/tiny", "--fast")
    assert code == 0, err
    assert ("GET", f"/owner/tiny/resolve/{COMMIT}/tokenizer.json") not in hub.asked[before:]


def test_gated_and_missing_models_are_refused(hub, store, run):
    code, _, err = run("pull", "owner/gated")
    assert (code, err.count("\n")) == (1, 1)
    assert "licence" in err
    assert "HF_TOKEN" in err
    code, _, err = run("pull", "owner/nothing")
    assert (code, err.count("\n")) == (1, 1)
    assert "owner/nothing" in err


def test_without_a_network_one_line_has_advice(store, known, monkeypatch, run):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # no server
    code, out, err = run("pull", "tiny")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "hf download owner/tiny --local-dir model/" in err
    assert "edgelm pull tiny --from model/" in err


def test_pull_from_a_local_checkpoint(store, known, monkeypatch, tiny_checkpoint, run):
    memory(monkeypatch, 16_000)
    checkpoint = tiny_checkpoint()
    code, _, err = run("pull", "tiny", "--from", checkpoint)
    assert code == 0, err
    assert open_bundle("tiny").manifest.quant == "int8"  # the catalogue's settings
    assert store.origin("tiny") == Origin(str(checkpoint), None)
    code, _, err = run("pull", "mine", "--from", checkpoint, "--fast", "--context", 64)
    assert code == 0, err
    assert (open_bundle("mine").manifest.quant, open_bundle("mine").manifest.context) == ("int5", 64)
    code, _, err = run("pull", "mine", "--from", checkpoint, "--quant", "int8", "--force")
    assert code == 0, err
    assert open_bundle("mine").manifest.quant == "int8"


def test_a_damaged_model_is_converted_again(store, tiny_checkpoint, run):
    checkpoint = tiny_checkpoint()
    assert run("pull", "mine", "--from", checkpoint, "--fast")[0] == 0
    for damage in ("cut", "no manifest"):
        place = store.bundle_path("mine")
        if damage == "cut":
            (place / "tokenizer.json").write_bytes(b"")
        else:
            (place / "manifest.json").unlink()
        code, _, err = run("pull", "mine", "--from", checkpoint, "--fast")
        assert code == 0, err
        assert "mine is damaged" in err
        assert open_bundle("mine")


def test_the_next_run_removes_what_killed_runs_left(store, tiny_checkpoint, run):
    folder = store.folder / "bundles"
    for name in (".mine.old1", ".mine.young", ".mine2.old2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.onnx.data").write_bytes(bytes(100))
    for name in (".mine.old1", ".mine2.old2"):
        for path in (folder / name / "model.onnx.data", folder / name):
            os.utime(path, (1_000_000_000, 1_000_000_000))
    assert run("pull", "mine", "--from", tiny_checkpoint(), "--fast")[0] == 0
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [".mine.young", ".mine2.old2", "mine"]
    assert run("rm", "mine")[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == [".mine2.old2"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing"], 1, "not in the catalogue"),
        (["tyni"], 1, "did you mean tiny?"),
        (["builtin"], 1, "built-in"),
        (["a/b/c"], 2, "'a/b/c'"),
        (["../x", "--from", "here"], 2, "NAME"),
        (["owner/x", "--from", "here"], 2, "NAME"),
        (["UPPER", "--from", "here"], 1, "1 to 64"),
        (["a b", "--from", "here"], 1, "1 to 64"),
        (["mine", "--from", "nowhere"], 1, "nowhere"),
        (["tiny", "--quant", "int3"], 2, "int8"),
        ([], 2, "NAME"),
    ],
)
def test_wrong_input_is_one_line(arguments, code, said, store, known, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an empty folder
    found, out, err = run("pull", *arguments)
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert said in err
    assert "internal error" not in err
    assert store.names() == []
