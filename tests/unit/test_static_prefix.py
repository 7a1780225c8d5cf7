"""A bundle's static prefix: its file, the command that adds and removes it, and what cannot be one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest
from tiny import TEXT

import edgelm
from edgelm.bundle import MANIFEST, File, open_bundle, to_json
from edgelm.engine import Engine
from edgelm.errors import BundleError, EdgelmError
from edgelm.memory import plan_memory
from edgelm.session import open_session
from edgelm.static_prefix import add_prefix, map_prefix, open_bare, remove_prefix
from edgelm.static_tokens import check_tokens, opening_tokens, read_opening
from edgelm.tokenizer import Tokenizer

TOKENS = [5, 9, 11, 40, 41, 42, 43]
MESSAGES = [{"role": "system", "content": "Answer in one short sentence."}]


@pytest.fixture
def copied(bundle, tmp_path):
    """The bundle's own files, without anything that lies beside them."""
    root = tmp_path / "bundle"
    root.mkdir()
    for name in (*open_bundle(bundle, verify=False).manifest.files, MANIFEST):
        shutil.copy(bundle / name, root / name)
    return root


@pytest.fixture
def opening(tmp_path):
    file = tmp_path / "opening.txt"
    file.write_text(TEXT[0], encoding="utf-8")
    return file


def contents(root):
    return {file.name: file.read_bytes() for file in root.iterdir()}


def refusal(root):
    with pytest.raises(BundleError) as caught:
        open_bundle(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the file ---


def test_the_file_is_the_memory_of_its_tokens(copied):
    made = add_prefix(open_bundle(copied), TOKENS, threads=1)
    opened = open_bundle(copied)
    assert opened == made
    prefix, cache = opened.manifest.prefix, opened.manifest.cache
    assert list(prefix.tokens) == TOKENS
    content = (copied / prefix.file).read_bytes()
    assert len(content) == len(TOKENS) * cache.bytes_per_token()
    session = open_session(opened, rows=3, threads=1)
    session.prefill(2, np.array(TOKENS, np.int64), 0)
    expected = np.stack(session.read_row(2, 0, len(TOKENS)))
    stored = np.frombuffer(content, "<f4").reshape(cache.layers, 2, cache.kv_heads, len(TOKENS), cache.head_size)
    assert np.array_equal(stored.reshape(expected.shape), expected)
    tokens, piece = map_prefix(opened)
    assert tokens.tolist() == TOKENS
    assert all(np.array_equal(one, other) for one, other in zip(piece, expected, strict=True))
    assert not any(array.flags.writeable or array.flags.owndata for array in piece)
    plan = plan_memory(opened.manifest, rows=1, context=10, prefix_bytes=0)
    assert plan.static_prefix == len(content)


def test_a_bundle_without_one_has_nothing_to_map(copied):
    assert map_prefix(open_bundle(copied)) is None


def test_another_prefix_replaces_it_and_none_brings_back_what_was(copied):
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
    assert {**after, MANIFEST: b""} == {**before, MANIFEST: b""}
    assert open_bundle(copied).manifest == open_bundle(copied, verify=False).manifest
    assert open_bundle(copied).manifest.prefix is None


# --- what is wrong with one ---


def test_other_weights_are_told_and_mended(copied, opening, run):
    made = add_prefix(open_bundle(copied), TOKENS)
    data = copied / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    file = File(len(content), hashlib.sha256(content).hexdigest())
    changed = dataclasses.replace(made.manifest, files={**made.manifest.files, data.name: file})
    (copied / MANIFEST).write_text(to_json(changed), encoding="utf-8")
    line = refusal(copied)
    assert "computed with other weights than model.onnx" in line
    assert f"edgelm prefix {copied} FILE" in line
    for command in (["generate", copied, "x"], ["info", copied]):
        code, out, err = run(*command)
        assert (code, out, err) == (1, "", f"edgelm {command[0]}: {line}\n")
    assert run("prefix", copied, opening)[0] == 0
    mended = open_bundle(copied)
    assert mended.manifest.prefix.weights == mended.manifest.weights_digest != made.manifest.weights_digest
    (copied / MANIFEST).write_text(to_json(changed), encoding="utf-8")
    assert run("prefix", copied, "--remove")[0] == 0
    assert open_bundle(copied).manifest.prefix is None


@pytest.mark.parametrize("damage", ["flipped", "torn", "missing"])
def test_a_damaged_file_is_found_and_mended(damage, copied, opening, run):
    file = copied / add_prefix(open_bundle(copied), TOKENS).manifest.prefix.file
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage == "flipped" else content[:-1])
    if damage == "missing":
        file.unlink()
    assert file.name in refusal(copied)
    if damage != "flipped":
        with pytest.raises(BundleError, match=file.name):
            Engine(open_bundle(copied, verify=False), threads=1)
    assert run("prefix", copied, opening)[0] == 0
    assert open_bundle(copied).manifest.prefix.file != file.name
    assert not file.exists()


def test_weights_are_checked_before_they_compute_anything(copied, opening, run):
    data = copied / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    before = contents(copied)
    code, out, err = run("prefix", copied, opening)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "model.onnx.data is damaged" in err
    assert contents(copied) == before
    with pytest.raises(BundleError, match="damaged"):
        open_bare(copied)


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
def test_a_manifest_with_an_impossible_prefix_is_damaged(changes, copied):
    add_prefix(open_bundle(copied), TOKENS)
    raw = json.loads((copied / MANIFEST).read_text("utf-8"))
    raw["prefix"].update(changes)
    (copied / MANIFEST).write_text(json.dumps(raw))
    assert "damaged" in refusal(copied)


@pytest.mark.parametrize("blocked", ["prefix.new", f"{MANIFEST}.new"])
@pytest.mark.parametrize("had", [False, True])
def test_a_failure_leaves_the_bundle_as_it_was(blocked, had, copied, opening, run):
    if had:
        add_prefix(open_bundle(copied), TOKENS)
    before = contents(copied)
    (copied / blocked).mkdir()  # nothing can be written under that name
    code, out, err = run("prefix", copied, opening)
    assert (code, out, err) == (1, "", f"edgelm prefix: {copied} cannot be written: Is a directory\n")
    (copied / blocked).rmdir()
    assert contents(copied) == before
    open_bundle(copied)


def test_what_a_power_cut_left_goes_with_the_next_prefix(copied):
    for name in ("prefix.new", f"{MANIFEST}.new", "prefix-0123456789abcdef.kv", "prefix-notes.kv"):
        (copied / name).write_bytes(b"torn")
    made = add_prefix(open_bundle(copied), TOKENS)
    assert {file.name for file in copied.iterdir()} == {*made.manifest.files, MANIFEST, "prefix-notes.kv"}


# --- what prompts may begin with ---


def test_limits(copied):
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
        ([5, *longest], f"has {manifest.context} tokens; the context leaves room for {manifest.context - 1}"),
        ([], "has no tokens"),
        ([5, manifest.vocab_size], rf"token {manifest.vocab_size}, which lies outside the vocabulary \[0, "),
        ([-1], "outside the vocabulary"),
    ]:
        with pytest.raises(EdgelmError, match=reason):
            add_prefix(open_bundle(copied), tokens)
        with pytest.raises(EdgelmError, match=reason):
            check_tokens(tokens, **sizes)
    with pytest.raises(EdgelmError, match="leaves room for 3: shorten it"):
        check_tokens([1, 2, 3, 4], **{**sizes, "long_from": 4})
    check_tokens([1, 2, 3], **{**sizes, "long_from": 4})
    assert contents(copied) == before


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n", "is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8 text"),
        ("a.json", b"[", "must be a JSON list of messages"),
        ("a.json", b"[]", "must be a JSON list of messages"),
        ("a.json", b'{"role": "system"}', "must be a JSON list of messages"),
        ("a.json", b'["hello"]', "must be a JSON list of messages"),
        ("a.json", b'[{"content": "x"}]', "each message must be an object with a string role"),
        ("folder", None, "cannot be read: Is a directory"),
        ("nothing", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_cannot_be_one(name, content, reason, copied, tmp_path, run):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    elif name == "folder":
        (tmp_path / name).mkdir()
    before = contents(copied)
    code, out, err = run("prefix", copied, tmp_path / name)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert reason in err
    assert contents(copied) == before


def test_text_and_messages_are_told_apart(tmp_path):
    file = tmp_path / "opening.txt"
    for text in ("[INST] be brief", '["a", "list"]', "[]", "7", "{}", " as it is \n"):
        file.write_text(text, encoding="utf-8")
        assert read_opening(file) == text
    file.write_text(json.dumps(MESSAGES), encoding="utf-8")
    assert read_opening(file) == MESSAGES


def test_messages_need_a_chat_template_that_takes_them(bundle):
    manifest = open_bundle(bundle, verify=False).manifest
    path = open_bundle(bundle, verify=False).tokenizer
    for template, reason in [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[-1].content }}", "shows nothing at the start"),
    ]:
        with pytest.raises(EdgelmError, match=reason):
            opening_tokens(MESSAGES, Tokenizer.from_file(path, template))
    assert opening_tokens("Once", Tokenizer.of_bundle(open_bundle(bundle, verify=False)))[0] < manifest.vocab_size


# --- the command ---


def test_add_show_use_remove(copied, tmp_path, run):
    file = tmp_path / "system.json"
    file.write_text(json.dumps(MESSAGES), encoding="utf-8")
    code, out, err = run("prefix", copied, file, "--threads", 1)
    assert (code, err) == (0, "")
    manifest = open_bundle(copied).manifest
    count = len(manifest.prefix.tokens)
    size = count * manifest.cache.bytes_per_token()
    assert out.startswith(f"{copied}: static prefix: {count} tokens, {size / 1e6:.2f} MB: ")
    assert f"{count} tokens, {size / 1e6:.2f} MB" in run("info", copied)[1]
    assert json.loads(run("info", copied, "--json")[1])["prefix"]["tokens"] == list(manifest.prefix.tokens)
    with edgelm.load(copied, threads=1, max_batch=1, prefix_cache_mb=0) as model:
        done = model.generate(messages=[*MESSAGES, {"role": "user", "content": "hello"}], max_tokens=2)
    assert done.usage.cached_tokens == count
    code, out, err = run("prefix", copied, "--remove", "--json")
    digest = open_bundle(copied).manifest.digest
    assert (code, err) == (0, "")
    assert json.loads(out) == {"bundle": str(copied), "tokens": 0, "bytes": 0, "digest": digest}
    code, _, err = run("prefix", copied, "--remove")
    assert (code, err) == (1, f"edgelm prefix: {copied} has no static prefix\n")


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["bundle"], 2, "give either FILE"),
        (["bundle", "file", "--remove"], 2, "give either FILE"),
        (["builtin", "file"], 1, "the built-in model stays as it is"),
        (["builtin", "--remove"], 1, "the built-in model stays as it is"),
        (["nowhere", "--remove"], 1, "nowhere is not a directory"),
    ],
)
def test_wrong_use(arguments, code, reason, run):
    found, out, err = run("prefix", *arguments)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert reason in err
