"""Small tokenizers of every kind that can be pruned, as tokenizer.json texts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from vocabularies import TEXTS, byte_fallback

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
DOMAIN = "\n".join([TEXTS[1], TEXTS[2]] * 3)
"""Text of the domain to prune for."""
KINDS = ("gpt2", "llama3", "llama2", "gemma", "unigram")


def write(folder: Path, made: str | tokenizers.Tokenizer | dict[str, Any]) -> Path:
    """Write a tokenizer.json: one of `KINDS`, or a tokenizer, or its parsed form."""
    text = (
        tokenizer_json(made) if isinstance(made, str) else json.dumps(made) if isinstance(made, dict) else made.to_str()
    )
    path = folder / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    return path


@cache
def tokenizer_json(kind: str) -> str:
    """The text of one tokenizer.json of `KINDS`."""
    return {"gpt2": _gpt2, "llama3": _llama3, "llama2": _llama2, "gemma": _gemma, "unigram": _unigram}[kind]()


def _gpt2() -> str:
    """Byte-level, special tokens first, a template around every text, padding, and a token added after all."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<|end|>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, _byte_trainer(600, ["<|end|>", "<s>"]))
    made.add_special_tokens(["<|user|>"])
    made.add_tokens([AddedToken("kitchen light", normalized=False)])
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _around(made, "<s>", "<|user|>")]
    )
    made.enable_padding(pad_id=made.token_to_id("<|end|>"), pad_token="<|end|>")
    return made.to_str()


def _llama3() -> str:
    """Byte-level, words found whole before any merge, special tokens after the model's own."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    words = Regex(r"\p{L}+| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, _byte_trainer(500, []))
    content = json.loads(made.to_str())
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != "Ġthe"]
    made = tokenizers.Tokenizer.from_str(json.dumps(content))  # " the" is now found whole or not at all
    made.add_special_tokens(["<|begin|>", "<|eot|>", "<|reserved|>"])
    made.post_processor = _around(made, "<|begin|>", "<|eot|>")
    return made.to_str()


def _llama2() -> str:
    """BPE with byte fallback, several merges to one token, a space before every text."""
    inner = byte_fallback()._inner
    made = tokenizers.Tokenizer.from_str(inner.to_str())
    made.enable_truncation(64)
    made.post_processor = processors.RobertaProcessing(sep=("</s>", 2), cls=("<s>", 1))
    return made.to_str()


def _gemma() -> str:
    """BPE with byte fallback, split before spaces, runs of newlines as added tokens that are not special."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, show_progress=False, limit_alphabet=80))
    learned = inner.get_vocab()
    names = ["<pad>", "<eos>", "<bos>", "\n\n", *BYTES, *sorted(learned, key=learned.get)]
    merges = json.loads(inner.to_str())["model"]["merges"]
    vocab = {name: token for token, name in enumerate(dict.fromkeys(names))}
    made = tokenizers.Tokenizer(models.BPE(vocab, [tuple(pair) for pair in merges], byte_fallback=True))
    made.normalizer = inner.normalizer
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    made.add_tokens([AddedToken("\n\n", normalized=False)])
    made.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A $B", [("<bos>", 2)])
    return made.to_str()


def _unigram() -> str:
    """Unigram with byte fallback, spaces as `▁`."""
    inner = tokenizers.Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.UnigramTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    inner.train_from_iterator(TEXTS, trainer)
    pieces = [tuple(piece) for piece in json.loads(inner.to_str())["model"]["vocab"]]
    pieces = [*pieces[:3], *((name, 0.0) for name in BYTES), *pieces[3:]]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.normalizer = inner.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.BertProcessing(sep=("</s>", 2), cls=("<s>", 1))
    return made.to_str()


def _byte_trainer(size: int, special: list[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _around(made: tokenizers.Tokenizer, first: str, last: str) -> processors.TemplateProcessing:
    special = [(name, made.token_to_id(name)) for name in (first, last)]
    return processors.TemplateProcessing(f"{first} $A {last}", f"{first} $A {last} $B {last}", special)
