"""Models by name: the catalogue, the user's bundles, and the resolution of names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.catalogue import USABLE_MEMORY_SHARE, check_name, load_catalogue
from edgelm.bundle.store import BUILTIN, BundleStore, Origin, resolve_bundle_path
from edgelm.errors import BundleError, EdgelmError

BUILTIN_FOLDER = Path(edgelm.__file__).parent / "builtin"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty default store."""
    monkeypatch.setenv("EDGELM_DATA_DIR", str(tmp_path / "data"))
    return BundleStore.default()


def put(store, name, origin=None):
    shutil.copytree(BUILTIN_FOLDER, store.bundle_path(name))
    if origin is not None:
        store.write_origin(name, origin)


def test_an_origin_is_written_atomically(store, monkeypatch):
    put(store, "mine", Origin("owner/model", "1"))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        store.write_origin("mine", Origin("owner/other", "2"))
    assert store.origin("mine") == Origin("owner/model", "1")
    assert sorted(path.name for path in (store.folder / "bundles").iterdir()) == ["mine", "mine.json"]


def test_every_entry_of_the_catalogue_is_complete():
    models = load_catalogue()
    assert len(models) >= 10
    assert [model.parameters for model in models.values()] == sorted(model.parameters for model in models.values())
    for name, model in models.items():
        check_name(name)
        owner, _, repository = model.hub.partition("/")
        assert owner
        assert repository
        assert model.licence
        assert model.good_at
        assert model.variants
        assert model.revision is None or len(model.revision) == 40
        assert 1 <= model.smallest_board_gb <= 16


@given(st.floats(1, 100_000), st.sampled_from(sorted(load_catalogue())))
def test_the_first_variant_that_fits_is_chosen(memory, name):
    model = load_catalogue()[name]
    found = model.choose_variant(memory)
    fitting = [variant for variant in model.variants if variant.memory_mb <= USABLE_MEMORY_SHARE * memory]
    assert found == (fitting[0] if fitting else None)
    assert model.choose_variant(None) == model.variants[0]
    for variant in model.variants:
        assert model.choose_variant(None, variant.quant) == variant


@given(st.text(max_size=80))
def test_only_valid_names_are_accepted(text):
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    is_name = 1 <= len(text) <= 64 and set(text) <= allowed and text[0] not in "._-"
    if is_name:
        check_name(text)
    else:
        with pytest.raises(EdgelmError, match="1 to 64"):
            check_name(text)


def test_a_name_selects_a_stored_bundle(store, run):
    put(store, "mine", Origin("owner/model", "0123456789abcdef"))
    assert resolve_bundle_path("mine") == store.bundle_path("mine")
    assert open_bundle("mine").path == store.bundle_path("mine")
    code, out, err = run("generate", "mine", "play some jazz")
    assert (code, err) == (0, "")
    assert json.loads(out)["intent"] == "PlayMusic"
    with edgelm.load("mine") as model:
        assert model.generate("play some jazz").text.startswith("{")
    code, out, _ = run("info", "mine", "--json")
    assert (code, json.loads(out)["digest"]) == (0, open_bundle(BUILTIN).manifest.digest)


def test_a_name_has_priority_over_a_directory_and_builtin_over_both(store, tmp_path, monkeypatch, run):
    put(store, "mine")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other", BUILTIN):
        (tmp_path / name).mkdir()
    assert resolve_bundle_path("mine") == store.bundle_path("mine")
    assert resolve_bundle_path("./mine") == resolve_bundle_path("mine/") == Path("mine")
    assert resolve_bundle_path("other") == Path("other")
    assert resolve_bundle_path(BUILTIN) == BUILTIN_FOLDER
    assert "cannot be opened" not in run("list")[1]


def test_list_and_show(store, run):
    code, out, _ = run("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["name", "builtin"]
    put(store, "mine", Origin("owner/model", "0123456789abcdef"))
    (store.folder / "bundles" / "broken").mkdir()
    code, out, _ = run("list")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "owner/model at 0123456789ab" in lines["mine"]
    assert "cannot be opened" in lines["broken"]
    found = {row["name"]: row for row in json.loads(run("list", "--json")[1])}
    assert found["mine"]["source"] == "owner/model"
    assert "error" in found["broken"]
    out = run("show", "mine")[1]
    assert "owner/model at 0123456789abcdef" in out
    assert "architecture" in out
    out = run("show", "qwen2.5-0.5b")[1]
    assert "Apache-2.0" in out
    assert "edgelm pull qwen2.5-0.5b" in out
    facts = json.loads(run("show", "qwen2.5-0.5b", "--json")[1])
    assert facts["catalogue"]["hub"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert facts["bundle"] is None


@pytest.mark.parametrize("record", ["", "{", "[1]", '{"source": 3, "revision": null}', '{"source": "a"}', "\x00\xff"])
def test_a_damaged_record_is_ignored(record, store, run):
    put(store, "mine")
    (store.folder / "bundles" / "mine.json").write_text(record, "latin-1")
    assert store.origin("mine") is None
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert "mine" in out


def test_models(store, run):
    put(store, "smollm2-135m")
    code, out, err = run("models")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 1 + len(load_catalogue())
    assert lines[1].endswith("(here)")
    assert not lines[2].endswith("(here)")
    assert {entry["name"] for entry in json.loads(run("models", "--json")[1])} == set(load_catalogue())


def test_rm_removes_the_named_bundle_and_its_cache_entries(store, run, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELM_CACHE_DIR", str(tmp_path / "cache"))
    from edgelm.system.board_cache import BoardCache, CacheKey

    for name in ("mine", "other"):
        put(store, name, Origin("owner/model"))
        metadata = {"bundle": str(store.bundle_path(name))}
        BoardCache.default().make(CacheKey("weights", name, "r", "c"), 1, lambda _, metadata=metadata: metadata)
    code, out, err = run("rm", "mine")
    assert (code, err) == (0, "")
    assert out.startswith("removed mine: 2.1 MB")
    assert store.names() == ["other"]
    assert sorted(path.name for path in (store.folder / "bundles").iterdir()) == ["other", "other.json"]
    assert [entry.metadata["bundle"] for entry in BoardCache.default().entries()] == [str(store.bundle_path("other"))]


@pytest.mark.parametrize("wrong", ["nothing", "builtin", "../mine", "", "Mine"])
def test_rm_removes_nothing_if_one_name_is_invalid(wrong, store, run):
    put(store, "mine")
    code, out, err = run("rm", "mine", wrong)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert store.names() == ["mine"]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("smollm2-135m", "`edgelm pull smollm2-135m`"),
        ("smolm2-135m", "smollm2-135m"),
        ("bultin", "builtin"),
        ("zzz", "`edgelm list`"),
        ("no/where", "`edgelm list`"),
    ],
)
def test_an_unknown_name_gives_advice(name, advice, store, run):
    for command in (["generate", name, "x"], ["info", name], ["serve", "--model", name], ["show", name]):
        code, out, err = run(*command)
        assert (code, out, err.count("\n")) == (1, "", 1), command
        if command[0] != "show" or name not in load_catalogue():
            assert advice in err
        if name in load_catalogue():
            break
    with pytest.raises(BundleError):
        edgelm.load(name)


def test_an_empty_variable_is_named(monkeypatch, run):
    monkeypatch.setenv("EDGELM_DATA_DIR", "")
    code, _, err = run("list")
    assert (code, err.count("\n")) == (1, 1)
    assert "EDGELM_DATA_DIR" in err
