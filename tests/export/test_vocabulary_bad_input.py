"""Errors of pruning: one line with the cause."""

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
        (WORD_LEVEL, "WordLevel"),
        (WORD_PIECE, "WordPiece"),
        (NO_BYTES, "bytes"),
        (edited("gpt2", 0.1, "model", "dropout"), "dropout 0.1"),
        (edited("gpt2", "</w>", "model", "end_of_word_suffix"), "end_of_word_suffix '</w>'"),
        (edited("gpt2", None, "decoder"), "byte-level BPE"),
        (edited("unigram", False, "model", "byte_fallback"), "bytes"),
        (edited("unigram", None, "model", "unk_id"), "unk_id"),
        (edited("llama2", {"type": "Fuse"}, "decoder"), "Fuse"),
        (edited("gemma", CTC, "decoder", "decoders", 2), "Replace, ByteFallback, CTC"),
        (edited("llama2", STRIP, "decoder", "decoders", 0), "strips"),
        (
            edited("gemma", {"String": "▁▁"}, "decoder", "decoders", 0, "pattern"),
            "replaces",
        ),
        (edited("llama2", ["</s>", 9999], "post_processor", "sep"), "9999"),
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
    with pytest.raises(DataError, match=r"\d+ tokens.* 100"):
        prune_vocabulary(write(tmp_path, "gpt2"), text, 300, model_vocab_size=ALL)


def test_a_text_with_lone_surrogates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Unicode"):
        prune_vocabulary(write(tmp_path, "gpt2"), DOMAIN + "\ud800", 300, model_vocab_size=ALL)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (-1, r" -1 .* at least \d+"),
        (200, r" 200 .* at least \d+"),
        (5000, r" 5000 .* \d+ tokens"),
    ],
)
def test_sizes_out_of_range_are_refused(tmp_path: Path, size: int, reason: str) -> None:
    with pytest.raises(EdgelmError, match=reason):
        prune_vocabulary(write(tmp_path, "gpt2"), DOMAIN, size, model_vocab_size=ALL)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r" 200 rows"):
        prune_vocabulary(write(tmp_path, "gpt2"), DOMAIN, 150, model_vocab_size=200)


@pytest.mark.parametrize("kind", ["llama3", "gemma"])
def test_required_tokens_that_do_not_exist_are_refused(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind)
    total = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    for token in (total, -1):
        with pytest.raises(CheckpointError, match=f" {token}, .*tokenizer.json"):
            prune_vocabulary(path, DOMAIN, 300, model_vocab_size=ALL, required=[token])


def test_required_tokens_without_a_row_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "llama3")
    reserved = tokenizers.Tokenizer.from_file(str(path)).token_to_id("<|reserved|>")
    with pytest.raises(CheckpointError, match=f" {reserved}, .* {reserved}"):
        prune_vocabulary(path, DOMAIN, 300, model_vocab_size=reserved, required=[reserved])


def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for text in (None, "", "[]", '{"model": {}}'):
        if text is not None:
            path.write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer.json"):
            prune_vocabulary(path, DOMAIN, 300, model_vocab_size=ALL)
