"""A bundle's static prefix: its file, damage and repair, and its limits."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from folder_hashes import contents
from tiny import TEXT

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.manifest import MANIFEST, BundleFile, dump_manifest
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.errors import BundleError, EdgelmError
from edgelm.runtime.memory_plan import plan_memory
from edgelm.runtime.prefix_file import add_prefix, map_prefix, open_without_prefix, remove_prefix
from edgelm.runtime.runner import open_runner
from edgelm.text.static_prompt import check_prefix_tokens

TOKENS = [5, 9, 11, 40, 41, 42, 43]
MESSAGES = [{"role": "system", "content": "Answer in one short sentence."}]


@pytest.fixture
def opening(tmp_path):
    file = tmp_path / "opening.txt"
    file.write_text(TEXT[0], encoding="utf-8")
    return file


def refusal(root):
    with pytest.raises(BundleError) as caught:
        open_bundle(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the file ---


def test_the_file_holds_the_kv_cache_of_its_tokens(copied):
    made = add_prefix(open_bundle(copied), TOKENS, threads=1)
    opened = open_bundle(copied)
    assert opened == made
    prefix, cache = opened.manifest.prefix, opened.manifest.cache
    assert list(prefix.tokens) == TOKENS
    content = (copied / prefix.file).read_bytes()
    assert len(content) == len(TOKENS) * cache.bytes_per_token()
    runner = open_runner(opened, rows=3, threads=1)
    runner.prefill(2, np.array(TOKENS, np.int64), 0)
    expected = np.stack(runner.read_row(2, 0, len(TOKENS)))
    stored = np.frombuffer(content, "<f4").reshape(cache.layers, 2, cache.kv_heads, len(TOKENS), cache.head_size)
    assert np.array_equal(stored.reshape(expected.shape), expected)
    tokens, piece = map_prefix(opened)
    assert tokens.tolist() == TOKENS
    assert all(np.array_equal(one, other) for one, other in zip(piece, expected, strict=True))
    assert not any(array.flags.writeable or array.flags.owndata for array in piece)
    plan = plan_memory(opened.manifest, rows=1, context=10, prefix_cache_bytes=0)
    assert plan.static_prefix == len(content)


def test_a_bundle_without_a_prefix_maps_nothing(copied):
    assert map_prefix(open_bundle(copied)) is None


def test_a_new_prefix_replaces_the_old_one_and_removing_it_restores_the_bundle(copied):
    before = contents(copied)
    first = add_prefix(open_bundle(copied), TOKENS)
    again = add_prefix(open_bundle(copied), TOKENS)
    assert again == first
    second = add_prefix(again, TOKENS[::-1])
    assert second.manifest.prefix.file != first.manifest.prefix.file
    assert set(contents(copied)) == {*before, second.manifest.prefix.file}
    assert open_bundle(copied) == second
    remove_prefix(second)
    after = contents(copied)
    assert {**after, MANIFEST: ""} == {**before, MANIFEST: ""}
    assert open_bundle(copied).manifest == open_bundle(copied, verify=False).manifest
    assert open_bundle(copied).manifest.prefix is None


# --- damage ---


def test_a_prefix_of_other_weights_is_refused_and_can_be_replaced(copied, opening, run):
    made = add_prefix(open_bundle(copied), TOKENS)
    data = copied / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    file = BundleFile(len(content), hashlib.sha256(content).hexdigest())
    changed = dataclasses.replace(made.manifest, files={**made.manifest.files, data.name: file})
    (copied / MANIFEST).write_text(dump_manifest(changed), encoding="utf-8")
    line = refusal(copied)
    assert "model.onnx" in line
    assert f"edgelm prefix {copied} FILE" in line
    for command in (["generate", copied, "x"], ["info", copied]):
        code, out, err = run(*command)
        assert (code, out, err) == (1, "", f"edgelm {command[0]}: {line}\n")
    assert run("prefix", copied, opening)[0] == 0
    mended = open_bundle(copied)
    assert mended.manifest.prefix.weights == mended.manifest.weights_digest != made.manifest.weights_digest
    (copied / MANIFEST).write_text(dump_manifest(changed), encoding="utf-8")
    assert run("prefix", copied, "--remove")[0] == 0
    assert open_bundle(copied).manifest.prefix is None


@pytest.mark.parametrize("damage", ["flipped", "torn", "missing"])
def test_a_damaged_file_is_refused_and_can_be_replaced(damage, copied, opening, run):
    file = copied / add_prefix(open_bundle(copied), TOKENS).manifest.prefix.file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage == "flipped" else content[:-1])
    if damage == "missing":
        file.unlink()
    assert file.name in refusal(copied)
    if damage != "flipped":
        with pytest.raises(BundleError, match=file.name):
            Engine(open_bundle(copied, verify=False), EngineOptions(threads=1))
    assert run("prefix", copied, opening)[0] == 0
    assert open_bundle(copied).manifest.prefix.file != file.name
    assert not file.exists()


def test_weights_are_verified_before_a_prefix_is_computed(copied, opening, run):
    data = copied / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    before = contents(copied)
    code, out, err = run("prefix", copied, opening)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "model.onnx.data" in err
    assert contents(copied) == before
    with pytest.raises(BundleError, match=r"model\.onnx\.data"):
        open_without_prefix(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": []},
        {"tokens": [-1]},
        {"tokens": [10**9]},
        {"tokens": ["1"]},
        {"tokens": 1},
        {"tokens": [1] * 10**5},
        {"file": "../model.onnx"},
        {"file": "nowhere.kv"},
        {"dtype": "float128"},
        {"weights": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_manifest_with_an_invalid_prefix_is_refused(changes, copied):
    add_prefix(open_bundle(copied), TOKENS)
    raw = json.loads((copied / MANIFEST).read_text("utf-8"))
    raw["prefix"].update(changes)
    (copied / MANIFEST).write_text(json.dumps(raw))
    assert MANIFEST in refusal(copied)


@pytest.mark.parametrize("blocked", ["prefix.new", f"{MANIFEST}.new"])
@pytest.mark.parametrize("had", [False, True])
def test_a_failure_leaves_the_bundle_as_it_was(blocked, had, copied, opening, run):
    if had:
        add_prefix(open_bundle(copied), TOKENS)
    before = contents(copied)
    (copied / blocked).mkdir()  # nothing can be written under that name
    code, out, err = run("prefix", copied, opening)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert str(copied) in err
    (copied / blocked).rmdir()
    assert contents(copied) == before
    open_bundle(copied)


def test_files_left_by_a_power_cut_are_removed_with_the_next_prefix(copied):
    for name in ("prefix.new", f"{MANIFEST}.new", "prefix-0123456789abcdef.kv", "prefix-notes.kv"):
        (copied / name).write_bytes(b"torn")
    made = add_prefix(open_bundle(copied), TOKENS)
    assert {file.name for file in copied.iterdir()} == {*made.manifest.files, MANIFEST, "prefix-notes.kv"}


# --- limits ---


def test_limits_of_the_tokens(copied):
    manifest = open_bundle(copied).manifest
    sizes = {"context": manifest.context, "vocab_size": manifest.vocab_size, "long_from": None}
    longest = [5] * (manifest.context - 1)
    add_prefix(open_bundle(copied), longest)
    with edgelm.load(copied, threads=1, max_batch=1) as model:
        done = model.generate(tokens=longest, max_tokens=1)
    assert done.usage.cached_tokens == len(longest) - 1  # the last one's logits are always computed
    with edgelm.load(copied, threads=1, max_batch=1, context=9) as model:
        assert model.generate(tokens=[5] * 8, max_tokens=1).usage.cached_tokens == 7
    before = contents(copied)
    for tokens, reason in [
        ([5, *longest], f"{manifest.context} .*{manifest.context - 1}"),
        ([], "no tokens"),
        ([5, manifest.vocab_size], rf"{manifest.vocab_size}.*\[0, "),
        ([-1], r"-1.*\[0, "),
    ]:
        with pytest.raises(EdgelmError, match=reason):
            add_prefix(open_bundle(copied), tokens)
        with pytest.raises(EdgelmError, match=reason):
            check_prefix_tokens(tokens, **sizes)
    with pytest.raises(EdgelmError, match=r"\b4\b.*\b3\b"):
        check_prefix_tokens([1, 2, 3, 4], **{**sizes, "long_from": 4})
    check_prefix_tokens([1, 2, 3], **{**sizes, "long_from": 4})
    assert contents(copied) == before
