"""A manifest is read as it was written, and each fault of a bundle is a one-line error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgelm.bundle.bundle_folder import open_bundle, write_manifest
from edgelm.bundle.manifest import (
    MANIFEST,
    SCHEMA,
    BundleFile,
    KVCacheShape,
    Manifest,
    Matrix,
    StaticPrefix,
    dump_manifest,
)
from edgelm.bundle.manifest_parser import parse_manifest
from edgelm.errors import BundleError
from edgelm.types import RANGES, SamplingParams

counts = st.integers(1, 2**40)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12)


@st.composite
def samplings(draw):
    given = {}
    for name, (low, high) in RANGES.items():
        if name == "seed":
            given[name] = draw(st.none() | st.integers(int(low), int(high)))
        elif isinstance(low, int):
            given[name] = draw(st.integers(low, int(high)))
        else:
            given[name] = draw(st.floats(low, high))
    stop = tuple(draw(st.lists(words.filter(bool), max_size=16)))
    return SamplingParams(**given, stop=stop, ignore_eos=draw(st.booleans()))


matrices = st.builds(
    Matrix,
    name=names,
    rows=counts,
    columns=counts,
    bits=st.sampled_from([4, 8, 32]),
    block_size=st.none() | st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    accuracy_level=st.none() | st.integers(0, 4),
    method=st.none() | words,
)
SIZES = {"layers": st.integers(1, 1024), "kv_heads": st.integers(1, 1024), "head_size": st.integers(1, 1024)}
tokens = st.integers(0, 99)
manifests = st.builds(
    Manifest,
    architecture=words,
    context=st.integers(1, 2**24 - 1),
    vocab_size=st.integers(100, 2**22),
    cache=st.builds(KVCacheShape, kind=st.just("shared"), bits=st.sampled_from([8, 32]), **SIZES)
    | st.builds(KVCacheShape, kind=st.just("growing"), **SIZES),
    quant=words,
    matrices=st.lists(matrices, max_size=4).map(tuple),
    bos_token=st.none() | tokens,
    eos_tokens=st.lists(tokens, max_size=4).map(tuple),
    parameters=counts,
    shapes=st.dictionaries(names, counts, max_size=4),
    sampling=samplings(),
    chat_template=st.none() | words,
    special_tokens=st.dictionaries(names, words, max_size=3),
    made_with=st.dictionaries(names, words, max_size=3),
    quality=st.none() | st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    via=st.sampled_from(["native", "optimum"]),
    needs_onnxruntime=st.none() | st.tuples(st.integers(0, 9), st.integers(0, 99)).map("{0[0]}.{0[1]}".format),
    graph=names,
)


@st.composite
def prefixed(draw):
    """A manifest with a static prefix and its file."""
    manifest = draw(manifests)
    context, vocab_size = manifest.context + 1, manifest.vocab_size  # one token must be able to follow
    tokens = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=min(context - 1, 20)).map(tuple))
    dtype = draw(st.sampled_from(["float32", "float16", "int8", "uint8"]))
    prefix = StaticPrefix(tokens, draw(names), dtype, draw(words))
    return dataclasses.replace(manifest, context=context, prefix=prefix, files={prefix.file: BundleFile(0, "")})


EXAMPLE = Manifest("llama", 64, 100, KVCacheShape("shared", 2, 1, 16), "int4", (), 1, (2,), 1000, {"layers": 2})


@given(manifest=manifests | prefixed())
def test_a_manifest_is_read_as_it_was_written(manifest):
    text = dump_manifest(manifest)
    assert parse_manifest(text, "manifest.json") == manifest
    assert dump_manifest(parse_manifest(text, "manifest.json")) == text
    assert manifest.digest == hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def folder(tmp_path):
    """A sealed bundle whose graph is not ONNX: opening a bundle does not parse it."""
    root = tmp_path / "bundle"
    root.mkdir()
    (root / "model.onnx").write_bytes(b"graph")
    (root / "tokenizer.json").write_bytes(b"{}")
    (root / "model.onnx.data").write_bytes(bytes(range(256)) * 20)
    write_manifest(root, EXAMPLE)
    return root


def refusal(root):
    with pytest.raises(BundleError) as caught:
        open_bundle(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(root, **changes):
    raw = json.loads((root / MANIFEST).read_text("utf-8"))
    (root / MANIFEST).write_text(json.dumps({**raw, **changes}), encoding="utf-8")


def test_a_sealed_bundle_opens(folder):
    bundle = open_bundle(str(folder))
    assert {**dataclasses.asdict(bundle.manifest), "files": {}} == dataclasses.asdict(EXAMPLE)
    assert bundle.bytes == 5 + 2 + 256 * 20
    assert (bundle.graph, bundle.tokenizer) == (folder / "model.onnx", folder / "tokenizer.json")
    assert set(bundle.manifest.files) == {"model.onnx", "model.onnx.data", "tokenizer.json"}


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    assert name in refusal(folder)


def test_any_flipped_bit_is_detected(folder):
    for name in ("model.onnx", "model.onnx.data", "tokenizer.json"):
        content = (folder / name).read_bytes()
        for at in {0, len(content) // 2, len(content) - 1}:
            broken = bytearray(content)
            broken[at] ^= 1
            (folder / name).write_bytes(broken)
            line = refusal(folder)
            assert name in line
            assert "SHA-256" in line
        (folder / name).write_bytes(content[:-1])
        assert str(len(content) - 1) in refusal(folder)
        (folder / name).write_bytes(content)
    open_bundle(folder)


def test_a_directory_instead_of_a_file_is_refused(folder):
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").mkdir()
    assert "model.onnx.data" in refusal(folder)


def test_a_newer_schema_is_refused(folder):
    rewrite(folder, schema=SCHEMA + 1, news="an unknown key")
    assert f"schema {SCHEMA + 1}" in refusal(folder)


@pytest.mark.parametrize("schema", [None, "1", True, 1.0, 0, -1])
def test_a_schema_that_is_not_a_positive_integer_is_refused(schema, folder):
    rewrite(folder, schema=schema)
    assert "schema" in refusal(folder)


def test_an_unknown_key_is_refused(folder):
    rewrite(folder, surprise=1)
    assert "surprise" in refusal(folder)


@pytest.mark.parametrize("key", ["architecture", "context", "cache", "files", "graph", "sampling", "eos_tokens"])
def test_a_missing_key_is_refused(key, folder):
    raw = json.loads((folder / MANIFEST).read_text("utf-8"))
    del raw[key]
    (folder / MANIFEST).write_text(json.dumps(raw))
    assert key in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "sub/../model.onnx", "a\0b", "x\\..\\y"]
)
def test_a_file_name_outside_the_bundle_is_refused(name, folder):
    (folder.parent / "secret").write_bytes(b"x")
    raw = json.loads((folder / MANIFEST).read_text("utf-8"))
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite(folder, files={**raw["files"], name: entry})
    assert MANIFEST in refusal(folder)
    rewrite(folder, files={**raw["files"], name: entry}, graph=name)
    assert MANIFEST in refusal(folder)


def test_the_graph_must_be_among_the_files(folder):
    rewrite(folder, graph="other.onnx")
    assert "other.onnx" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b"[" * 100_000, b'{"schema": 1}', b'{"name": "a package"}'],
)
def test_a_file_that_is_not_a_manifest_is_refused(content, folder):
    (folder / MANIFEST).write_bytes(content)
    assert MANIFEST in refusal(folder)


def test_a_path_that_is_not_a_bundle_is_refused(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "nowhere", folder / MANIFEST, tmp_path / "photos"):
        assert str(path) in refusal(path)
    shutil.rmtree(folder)
    assert str(folder) in refusal(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
KEYS = [field.name for field in dataclasses.fields(Manifest)]
NULLABLE = {
    *("bos_token", "chat_template", "quality", "self_check", "vocabulary", "adapter", "long_from", "needs_onnxruntime"),
}
FULL = dataclasses.replace(
    EXAMPLE,
    chat_template="{}",
    quality={},
    self_check={},
    vocabulary={},
    adapter="lora",
    long_from=4096,
    needs_onnxruntime="1.28",
)


@settings(max_examples=300)
@given(key=st.sampled_from(KEYS), value=json_values)
def test_a_value_of_the_wrong_type_is_refused(key, value):
    raw = json.loads(dump_manifest(FULL))
    text = json.dumps({**raw, key: value})
    expected = type(getattr(FULL, key))
    if isinstance(value, list if expected is tuple else expected) or (value is None and key in NULLABLE):
        assume(isinstance(value, (str, type(None))) and key not in ("graph", "via", "needs_onnxruntime"))
        assert getattr(parse_manifest(text, MANIFEST), key) == value
        return
    with pytest.raises(BundleError, match=MANIFEST):
        parse_manifest(text, MANIFEST)


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 0},
        {"context": 2**24 + 1},
        {"vocab_size": -1},
        {"vocab_size": 2**22 + 1},
        {"parameters": 2**63},
        {"long_from": 0},
        {"eos_tokens": [100]},
        {"eos_tokens": [-1]},
        {"bos_token": 10**9},
        {"eos_tokens": [1] * 100_001},
        {"shapes": {"layers": -1}},
        {"shapes": {"layers" * 2000: 1}},
        {"notes": ["n"] * 1001},
        {"notes": ["n" * 10_001]},
        {"chat_template": "t" * 1_000_001},
        {"matrices": [{"name": "head", "rows": 2**41, "columns": 2, "bits": 4}]},
        {"matrices": [{"name": "head", "rows": 2, "columns": 2, "bits": 4, "block_size": 0}]},
        {"matrices": [{"name": "head", "rows": 2, "columns": 2, "bits": 65}]},
        {"cache": {"kind": "shared", "layers": 1025, "kv_heads": 1, "head_size": 16}},
        {"cache": {"kind": "shared", "layers": 1, "kv_heads": 1025, "head_size": 16}},
        {"cache": {"kind": "shared", "layers": 1, "kv_heads": 1, "head_size": 2**40}},
        {"files": {"model.onnx": {"bytes": 2**41, "sha256": "0"}}},
        {"cache": {"kind": "shared", "layers": 0, "kv_heads": 1, "head_size": 16}},
        {"cache": {"kind": "paged", "layers": 1, "kv_heads": 1, "head_size": 16}},
        {"cache": {"kind": "shared", "layers": 1, "kv_heads": 1, "head_size": 16, "bits": 4}},
        {"cache": {"kind": "shared", "layers": 1, "kv_heads": 1, "head_size": 16, "bits": 8.0}},
        {"cache": {"kind": "growing", "layers": 1, "kv_heads": 1, "head_size": 16, "bits": 8}},
        {"needs_onnxruntime": "new"},
        {"needs_onnxruntime": "1.28.0"},
        {"cache": {"kind": "shared", "layers": 1.5, "kv_heads": 1, "head_size": 16}},
        {"matrices": [{"name": "head", "rows": "1", "columns": 2, "bits": 4}]},
        {"eos_tokens": [1, None]},
        {"chat_template": 5},
        {"bos_token": True},
        {"special_tokens": {"bos_token": 1}},
        {"files": {"model.onnx": {"bytes": "5", "sha256": "0"}}},
        {"sampling": {"temperature": -1.0, "stop": []}},
        {"via": "magic"},
    ],
    ids=str,
)
def test_an_invalid_value_is_refused(changes, folder):
    rewrite(folder, **changes)
    assert MANIFEST in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"cache": {"kind": "shared", "layers": "4", "kv_heads": 1, "head_size": 16}}, ["cache.layers", "1024", "'4'"]),
        ({"cache": {"kind": "paged", "layers": 1, "kv_heads": 1, "head_size": 16}}, ["cache.kind", "shared, growing"]),
        ({"matrices": [{"name": "a", "rows": 1, "columns": 1, "bits": 65}]}, ["matrices[0].bits", "[1, 64]", "65"]),
        ({"eos_tokens": [1, None]}, ["eos_tokens[1]", "None"]),
        ({"files": {"model.onnx": {"bytes": -1, "sha256": ""}}}, ["files['model.onnx'].bytes", "-1"]),
        ({"notes": ["n" * 10_001]}, ["notes[0]", "10000", "10001"]),
        ({"contxt": 3}, ["contxt", "did you mean context"]),
        ({"context": 2**70}, ["context", str(2**24), str(2**70)]),
        ({"cache": {}}, ["cache.kind", "cache.layers"]),
    ],
    ids=str,
)
def test_an_error_names_the_key_the_value_and_what_is_allowed(changes, facts, folder):
    rewrite(folder, **changes)
    message = refusal(folder)
    assert len(message) < 1000
    assert not [fact for fact in facts if fact not in message], message


def test_a_duplicate_key_is_refused(folder):
    text = (folder / MANIFEST).read_text("utf-8")
    (folder / MANIFEST).write_text(text.replace('"context": 64', '"context": 64, "context": 32'), "utf-8")
    assert "'context'" in refusal(folder)


@pytest.mark.parametrize(
    "change", [{"quant": "\ud800"}, {"made_with": {"\udfff": "a"}}, {"quality": {"a": ["\udc00"]}}]
)
def test_an_unpaired_surrogate_is_refused(change, folder):
    """Such text cannot be encoded in UTF-8."""
    rewrite(folder, **change)
    assert "surrogate" in refusal(folder)


def test_a_surrogate_pair_is_one_character(folder):
    rewrite(folder, quant="\U0001f600")
    assert open_bundle(folder).manifest.quant == "\U0001f600"


def test_a_named_pipe_as_manifest_is_not_read(folder):
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    assert MANIFEST in refusal(folder)


@pytest.mark.parametrize("target", ["model.onnx", "../secret", "/etc/hostname", "nowhere"])
def test_a_link_out_of_the_bundle_is_refused(folder, target):
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(target)
    assert "model.onnx" in refusal(folder)


def test_a_too_large_manifest_is_not_read(folder):
    with (folder / MANIFEST).open("ab") as stream:
        stream.truncate(1 << 34)  # a sparse file
    assert "16000000 bytes" in refusal(folder)


def test_an_older_manifest_has_a_float32_cache(folder):
    raw = json.loads((folder / MANIFEST).read_text("utf-8"))
    del raw["cache"]["bits"], raw["needs_onnxruntime"]
    (folder / MANIFEST).write_text(json.dumps(raw), encoding="utf-8")
    manifest = open_bundle(folder).manifest
    assert manifest == dataclasses.replace(EXAMPLE, files=manifest.files)
    assert manifest.cache.bytes_per_token() == 2 * 2 * 16 * 4
    assert dataclasses.replace(manifest.cache, bits=8).bytes_per_token() == 2 * 2 * 16
