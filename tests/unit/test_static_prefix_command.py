"""`edgelm prefix`: what it reads, shows, adds and removes."""

from __future__ import annotations

import json

import pytest
from folder_hashes import contents

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import EdgelmError
from edgelm.text.static_prompt import read_prefix_text, tokenize_prefix
from edgelm.text.tokenizer import Tokenizer

MESSAGES = [{"role": "system", "content": "Answer in one short sentence."}]


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
        assert read_prefix_text(file) == text
    file.write_text(json.dumps(MESSAGES), encoding="utf-8")
    assert read_prefix_text(file) == MESSAGES


def test_messages_need_a_chat_template_that_takes_them(bundle):
    manifest = open_bundle(bundle, verify=False).manifest
    path = open_bundle(bundle, verify=False).tokenizer
    for template, reason in [
        (None, "chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[-1].content }}", "prefix"),
    ]:
        with pytest.raises(EdgelmError, match=reason):
            tokenize_prefix(MESSAGES, Tokenizer.from_file(path, template))
    assert tokenize_prefix("Once", Tokenizer.of_bundle(open_bundle(bundle, verify=False)))[0] < manifest.vocab_size


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
        (["bundle"], 2, "--remove"),
        (["bundle", "file", "--remove"], 2, "--remove"),
        (["builtin", "file"], 1, "built-in"),
        (["builtin", "--remove"], 1, "built-in"),
        (["nowhere", "--remove"], 1, "nowhere is not a directory"),
    ],
)
def test_wrong_use(arguments, code, reason, run):
    found, out, err = run("prefix", *arguments)
    assert (found, out, err.count("\n")) == (code, "", 1)
    assert reason in err
