"""`edgelm export --prefix`: a bundle with a static prefix."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
from tiny import TEXT

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import EdgelmError

MESSAGES = [{"role": "system", "content": "Answer in one short sentence."}]


@pytest.fixture
def system(tmp_path):
    file = tmp_path / "system.json"
    file.write_text(json.dumps(MESSAGES), encoding="utf-8")
    return file


def test_the_first_answer_uses_the_prefix(tiny_checkpoint, tmp_path, system, run):
    code, out, _ = run("export", tiny_checkpoint(), tmp_path / "out", "--prefix", system)
    manifest = open_bundle(tmp_path / "out").manifest
    count = len(manifest.prefix.tokens)
    assert code == 0
    assert f"static prefix: {count} tokens" in out
    with edgelm.load(tmp_path / "out", threads=1, max_batch=1) as model:
        done = model.generate(messages=[*MESSAGES, {"role": "user", "content": "hello"}], max_tokens=2)
    assert done.usage.cached_tokens == count > 10
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    assert run("prefix", tmp_path / "other", "--remove")[0] == 0
    assert run("prefix", tmp_path / "other", system)[0] == 0
    assert open_bundle(tmp_path / "other").manifest == manifest
    code, out, _ = run("export", tiny_checkpoint(), tmp_path / "out", "--prefix", system, "--force", "--json")
    assert (code, json.loads(out)["prefix_tokens"]) == (0, count)


def test_the_prefix_uses_the_pruned_vocabulary_and_counts_in_max_bytes(tiny_checkpoint, tmp_path, system):
    text = tmp_path / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(TEXT * 12), encoding="utf-8")
    options = {"vocab": text, "vocab_size": 300, "calibrate": text, "prefix": system}
    least = edgelm_export.export(tiny_checkpoint(), tmp_path / "int4", quant="int4", **options)
    most = edgelm_export.export(tiny_checkpoint(), tmp_path / "int8", quant="int8", method="rtn", prefix=system)
    middle = (least.bytes + most.bytes) // 2
    between = edgelm_export.export(tiny_checkpoint(), tmp_path / "out", max_bytes=middle, **options)
    assert between.bytes <= middle
    assert max(between.manifest.prefix.tokens) < between.manifest.vocab_size == 300
    assert len({matrix.bits for matrix in between.manifest.matrices}) > 1
    outline = edgelm_export.outline(tiny_checkpoint(), quant="int4", **options)
    assert abs(outline.bytes - least.bytes) <= 512


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "opening.txt"),
        ("word " * 600, r"\d+ tokens.* 511"),
        ('[{"content": "no role"}]', "role"),
        (None, "opening.txt"),
    ],
)
def test_a_bad_prefix_leaves_nothing(content, reason, tiny_checkpoint, tmp_path):
    file = tmp_path / "opening.txt"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    before = list(tmp_path.iterdir())
    for call in (edgelm_export.export, lambda checkpoint, _, prefix: edgelm_export.outline(checkpoint, prefix=prefix)):
        with pytest.raises(EdgelmError, match=reason):
            call(tiny_checkpoint(), tmp_path / "out", prefix=file)
    assert list(tmp_path.iterdir()) == before
