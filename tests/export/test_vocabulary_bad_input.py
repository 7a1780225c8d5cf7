"""What pruning refuses: one line that says what was wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from prunable_tokenizers import DOMAIN, tokenizer_json, write
from tokenizers import models

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.vocabulary import prune_vocabulary

from edgelm.errors import CheckpointError, DataError, EdgelmError

ALL = 10_000


def edited(kind: str, value: Any, *keys: str | int) -> dict[str, Any]:
    """A tokenizer of `prunable` with another value at a place."""
    content = json.loads(tokenizer_json(kind))
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return content


WORD_LEVEL = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, "<unk>"))
WORD_PIECE = tokenizers.Tokenizer(models.WordPiece({"a": 0, "<unk>": 1}, unk_token="<unk>"))
NO_BYTES = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
CTC = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (WORD_LEVEL, "its model is WordLevel; BPE and Unigram can"),
        (WORD_PIECE, "its model is WordPiece; BPE and Unigram can"),
        (NO_BYTES, "it spells no bytes"),
        (edited("gpt2", 0.1, "model", "dropout"), "its model has dropout 0.1"),
        (edited("gpt2", "</w>", "model", "end_of_word_suffix"), "its model has end_of_word_suffix '</w>'"),
        (edited("gpt2", None, "decoder"), "only byte-level BPE is known"),
        (edited("unigram", False, "model", "byte_fallback"), "it spells no bytes"),
        (edited("unigram", None, "model", "unk_id"), "its Unigram model has no unk_id"),
        (edited("llama2", {"type": "Fuse"}, "decoder"), "its decoder is Fuse"),
        (edited("gemma", CTC, "decoder", "decoders", 2), "its decoder is Replace, ByteFallback, CTC"),
        (edited("llama2", STRIP, "decoder", "decoders", 0), "its decoder strips single tokens"),
        (
            edited("gemma", {"String": "▁▁"}, "decoder", "decoders", 0, "pattern"),
            "replaces more than single",
        ),
        (edited("llama2", ["</s>", 9999], "post_processor", "sep"), "names the id 9999, which is no token's"),
    ],
)
def test_tokenizers_that_would_lose_text_are_refused(tmp_path: Path, made: Any, reason: str) -> None:
    path = write(tmp_path, made)
    with pytest.raises(CheckpointError) as refusal:
        prune_vocabulary(path, DOMAIN, 300, model_vocab_size=ALL)
    assert reason in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", " \n", "turn on the light"])
def test_a_text_too_short_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"has \d+ tokens; give at least 100"):
        prune_vocabulary(write(tmp_path, "gpt2"), text, 300, model_vocab_size=ALL)


def test_a_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        prune_vocabulary(write(tmp_path, "gpt2"), DOMAIN + "\ud800", 300, model_vocab_size=ALL)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (-1, "a vocabulary of -1 cannot hold the bytes, the special tokens and what they are made of: choose at least"),
        (
            200,
            "a vocabulary of 200 cannot hold the bytes, the special tokens and what they are made of: choose at least",
        ),
        (5000, "a vocabulary of 5000 was asked for, but"),
    ],
)
def test_sizes_out_of_range_are_refused(tmp_path: Path, size: int, reason: str) -> None:
    with pytest.raises(EdgelmError, match=reason):
        prune_vocabulary(write(tmp_path, "gpt2"), DOMAIN, size, model_vocab_size=ALL)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the model 200 rows: they do not belong together"):
        prune_vocabulary(write(tmp_path, "gpt2"), DOMAIN, 150, model_vocab_size=200)


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_required_tokens_that_do_not_exist_are_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    total = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    for token in (total, -1):
        with pytest.raises(CheckpointError, match=f"the token {token}, which has to stay, is not in"):
            prune_vocabulary(path, DOMAIN, 300, model_vocab_size=ALL, required=[token])


def test_required_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "llama3")
    reserved = tokenizers.Tokenizer.from_file(str(path)).token_to_id("<|reserved|>")
    with pytest.raises(CheckpointError, match=f"the token {reserved}, which has to stay, has no row"):
        prune_vocabulary(path, DOMAIN, 300, model_vocab_size=reserved, required=[reserved])


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for text in (None, "", "[]", '{"model": {}}'):
        if text is not None:
            path.write_text(text)
        with pytest.raises(CheckpointError, match="that we can read"):
            prune_vocabulary(path, DOMAIN, 300, model_vocab_size=ALL)
