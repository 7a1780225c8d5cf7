"""An untrusted tokenizer.json is refused with one error, or read at the usual cost."""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vocabularies import byte_fallback, byte_level

from edgelm.errors import BundleError, EdgelmError, RequestError
from edgelm.text.tainted_text import SpecialTokenFinder, TaintedText, TaintTracker
from edgelm.text.tokenizer import Tokenizer
from edgelm.text.tokenizer_file import MAX_ADDED_TOKENS, MAX_GROWTH, MAX_TOKEN_ID

Change = Callable[[dict[str, Any]], None]


def written(path: Path, change: Change, *, escaped: str = "") -> Path:
    """Write a changed tokenizer.json; the first letter of the key `escaped` is written as a Unicode escape."""
    content = json.loads(byte_level()._inner.to_str())
    change(content)
    text = json.dumps(content)
    file = path / "tokenizer.json"
    file.write_text(text.replace(f'"{escaped}', f'"\\u{ord(escaped[0]):04x}{escaped[1:]}') if escaped else text)
    return file


def put(part: str, value: Any) -> Change:
    return lambda content: content.update({part: value})


def split(pattern: str) -> Change:
    return put(
        "pre_tokenizer", {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    )


def replace(pattern: dict[str, str], text: str, times: int = 1, part: str = "normalizer") -> Change:
    one = {"type": "Replace", "pattern": pattern, "content": text}
    name = "decoders" if part == "decoder" else "normalizers"
    return put(part, {"type": "Sequence", name: [one] * times})


def charsmap(size: int) -> Change:
    encoded = base64.b64encode(struct.pack("<I", size) + bytes(8)).decode()
    return put("normalizer", {"type": "Precompiled", "precompiled_charsmap": encoded})


def token(number: int) -> Change:
    return lambda content: content["model"]["vocab"].update({"far": number})


def around(count: int) -> Change:
    entry = {"id": "<s>", "ids": [0] * count, "tokens": ["<s>"] * count}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return put(
        "post_processor", {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"<s>": entry}}
    )


REFUSED: dict[str, tuple[Change, str]] = {
    "an id of 32 bits": (token(2**32 - 1), str(MAX_TOKEN_ID)),
    "an id above the largest": (token(MAX_TOKEN_ID + 1), str(MAX_TOKEN_ID)),
    "an id around a text": (lambda c: (around(1)(c), c["post_processor"]["special_tokens"]["<s>"].update(ids=[4 * 10**9])), str(MAX_TOKEN_ID)),
    "a table's size": (charsmap(2**32 - 1), "precompiled_charsmap"),
    "many tokens around a text": (around(MAX_ADDED_TOKENS + 1), f"{MAX_ADDED_TOKENS} tokens"),
    "replaced by a long text": (replace({"String": "a"}, "a" * (MAX_GROWTH + 1)), f"{MAX_GROWTH} times"),
    "replaced step by step": (replace({"String": "a"}, "aaaaaaaaaa", 9), f"{MAX_GROWTH} times"),
    "matched and replaced": (replace({"Regex": "."}, "x" * (MAX_GROWTH + 1)), f"{MAX_GROWTH} times"),
    "replaced in an answer": (replace({"String": "a"}, "a" * 10, 9, "decoder"), f"{MAX_GROWTH} times"),
    "nested repetitions": (split("(a+)+$"), "regular expressions|retry-limit"),
    "nested alternatives": (split("(?:a|a)*$"), "regular expressions|retry-limit"),
    "many repetitions": (split(r"\s*\s*\s*\s*\s*\s*x"), "regular expressions|retry-limit"),
    "repetitions in a replacement": (replace({"Regex": "(a+)+$"}, "b"), "regular expressions|retry-limit"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_hostile_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    change, words = REFUSED[kind]
    with pytest.raises(BundleError, match=words) as caught:
        Tokenizer.from_file(written(tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "name"), [(charsmap(2**32 - 1), "precompiled_charsmap"), (charsmap(2**32 - 1), "normalizer")]
)
def test_an_escaped_key_is_checked_too(tmp_path: Path, change: Change, name: str) -> None:
    with pytest.raises(BundleError, match="precompiled_charsmap"):
        Tokenizer.from_file(written(tmp_path, change, escaped=name))


@pytest.mark.parametrize(
    "change",
    [
        around(MAX_ADDED_TOKENS),
        replace({"String": "a"}, "b" * MAX_GROWTH),
        replace({"String": " "}, "\u2581"),
        split(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"),
        split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        lambda content: None,
    ],
    ids=["tokens around", "a longer text", "SentencePiece", "Llama 3", "GPT-4o", "as it is"],
)  # fmt: skip
def test_published_tokenizers_are_read(tmp_path: Path, change: Change) -> None:
    assert Tokenizer.from_file(written(tmp_path, change)).encode("turn on the light")


def test_a_text_without_tokens_is_one_error(tmp_path: Path) -> None:
    """For a word-level model without its unknown token the library raises a plain exception."""
    file = written(tmp_path, put("model", {"type": "WordLevel", "vocab": {"on": 0}, "unk_token": "<unk>"}))
    with pytest.raises(EdgelmError, match="tokenizer") as caught:
        Tokenizer.from_file(file).encode("off")
    assert "\n" not in str(caught.value)


def test_a_panic_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Broken:
        def encode_batch(self, *_: object, **__: object) -> object:
            raise PanicException("index out of bounds:\nthe len is 3")

        decode = encode_batch

    tokenizer = byte_fallback()
    monkeypatch.setattr(tokenizer, "_inner", Broken())
    for use in (lambda: tokenizer.encode("x"), lambda: tokenizer.decode([1])):
        with pytest.raises(RequestError, match="index out of bounds: the len is 3"):
            use()


def test_an_error_is_one_line_of_limited_length() -> None:
    assert str(EdgelmError("names a\n\x85b\u2028c")) == "names a  b c"
    assert len(str(BundleError("x" * 10**6))) < 10_000


@pytest.mark.parametrize(
    "method", [lambda t: t.split("</think>"), lambda t: t.splitlines(), lambda t: list(t), lambda t: t[::-1]]
)
def test_a_long_text_with_marks_is_split_in_time(method: Callable[[str], object]) -> None:
    """Operations of a template on a message of 64 KB: searching all marks again for each slice took a minute."""
    tracker = TaintTracker(SpecialTokenFinder(["<|im_end|>"]), [])
    text = tracker.taint("</think>\n" * 7000 + "<|im_end|>")
    assert isinstance(text, TaintedText)
    begun = time.thread_time()
    method(text)
    assert time.thread_time() - begun < 3


def test_an_export_refuses_one_before_a_library_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="needs pip install 'edgelm[export]'")
    import edgelm_export
    from tiny import TinyLlama

    from edgelm.errors import CheckpointError

    checkpoint = TinyLlama(layers=1).write(tmp_path / "checkpoint")
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    charsmap(2**32 - 1)(content)
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(CheckpointError, match="precompiled_charsmap"):
        edgelm_export.export(checkpoint, tmp_path / "out", fast=True)


def test_an_export_refuses_an_id_outside_the_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="needs pip install 'edgelm[export]'")
    import edgelm_export
    from tiny import TinyLlama

    from edgelm.errors import CheckpointError

    checkpoint = TinyLlama(layers=1).write(tmp_path / "checkpoint")
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    content["model"]["vocab"]["e"] = 5000
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(CheckpointError, match="5000"):
        edgelm_export.export(checkpoint, tmp_path / "out", fast=True)
