"""A tokenizer.json for pruning: its tokens, its references to ids, and whether pruning can preserve every text.

Knows the file format. Does not decide which tokens are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers

from edgelm.errors import CheckpointError
from edgelm.text.tokenizer_file import check_numbers

from .bpe import BpeModel
from .unigram import UnigramModel

BYTE_TOKENS: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))
DECODERS: Final = {"ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"}
"""Decoders allowed with byte fallback: none of them depends on where one token ends and the next begins."""
WITHOUT_IDS: Final = {"ByteLevel"}


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """A tokenizer that can be pruned.

    content: the file as the library writes it. model: its model. ids: the id of every token by its text, added tokens
    included. model_ids: ids of the model's own tokens. required_ids: tokens without which some text could not be
    encoded.
    """

    path: Path
    tokenizer: tokenizers.Tokenizer
    content: Mapping[str, Any]
    model: BpeModel | UnigramModel
    ids: Mapping[str, int]
    model_ids: frozenset[int]
    required_ids: frozenset[int]

    @property
    def added_ids(self) -> list[int]:
        """Ids of the added tokens, special or not, ascending. Those not in `model_ids` follow the model's own."""
        return sorted(token["id"] for token in self.content["added_tokens"])

    def referenced_ids(self) -> set[int]:
        """Return the ids that padding and post-processor refer to."""
        return {holder[key] for holder, key in _id_references(self.content)}

    def pruned(self, new: Mapping[int, int]) -> str:
        """Return the text of a tokenizer.json with the kept tokens; `new` maps their old ids to new ones, in order."""
        content = deepcopy({name: value for name, value in self.content.items() if name != "model"})
        for holder, key in _id_references(content):
            holder[key] = new[holder[key]]
        added = [{**token, "id": new[token["id"]]} for token in content["added_tokens"] if token["id"] in new]
        content["added_tokens"] = sorted(added, key=lambda token: token["id"])
        content["model"] = self.model.pruned(new)
        return json.dumps(content, ensure_ascii=False)


def read_tokenizer_json(path: str | Path, text: str | None = None) -> TokenizerJson:
    """Read a tokenizer.json for pruning. If `text` is given, `path` is only its name in messages.

    Raises `CheckpointError` if it cannot be read, or if texts would be lost: it cannot spell bytes, or its decoding
    depends on where tokens end.
    """
    try:
        if text is None:
            check_numbers(Path(path))
        inner = tokenizers.Tokenizer.from_file(str(path)) if text is None else tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: not a supported tokenizer.json: {error}") from error
    content = json.loads(inner.to_str())
    inner.no_truncation()
    inner.no_padding()
    ids = inner.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) < len(ids):
        raise CheckpointError(f"{path} gives two tokens the same id: its vocabulary cannot be pruned")
    reason = _obstacle(content, ids)
    if reason is not None:
        raise CheckpointError(f"{path}: the vocabulary cannot be pruned: {reason}")
    basis = _spelling(content, ids)
    model: BpeModel | UnigramModel
    if content["model"]["type"] == "BPE":
        model = BpeModel(content["model"], basis)
        unknown = content["model"]["unk_token"]
        basis |= {ids[unknown]} if unknown in ids else set()
    else:
        model = UnigramModel(content["model"], basis)
        basis |= model.required_ids()
    try:
        lost = {holder[key] for holder, key in _id_references(content)} - set(ids.values())
    except ValueError as error:
        raise CheckpointError(f"{path}: the vocabulary cannot be pruned: {error}") from error
    if lost:
        raise CheckpointError(
            f"{path}: its post-processor or padding refers to the id {min(lost)}, which is not a token"
        )
    base = frozenset(inner.get_vocab(with_added_tokens=False).values())
    return TokenizerJson(Path(path), inner, content, model, ids, base, frozenset(basis))


def _obstacle(content: Mapping[str, Any], ids: Mapping[str, int]) -> str | None:
    """Return why some texts would not survive pruning; None if all would."""
    model = content["model"]
    kind = model["type"]
    if kind not in ("BPE", "Unigram"):
        return f"its model is {kind}; BPE and Unigram can"
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            return f"its model has {option} {model[option]!r}"
    if kind == "Unigram" and model["unk_id"] is None:
        return "its Unigram model has no unk_id"
    decoders = _types(content["decoder"])
    if _is_byte_level(content):
        return None if kind == "BPE" and decoders == ["ByteLevel"] else "only byte-level BPE is known, not this mixture"
    if not model.get("byte_fallback") or any(name not in ids for name in BYTE_TOKENS):
        return "it spells no bytes, so that text outside the new vocabulary would be lost"
    if "ByteFallback" not in decoders or set(decoders) - DECODERS:
        return (
            f"its decoder is {', '.join(decoders) or 'none'}; byte fallback needs ByteFallback and knows "
            + ", ".join(sorted(DECODERS))
        )
    if "Strip" in decoders and "Fuse" not in decoders[: decoders.index("Strip")]:
        return "its decoder strips single tokens"
    if any(len(sign) != 1 for sign in _signs(content["decoder"])):
        return "its decoder replaces more than single characters"
    return None


def _spelling(content: Mapping[str, Any], ids: Mapping[str, int]) -> set[int]:
    """Return the tokens that spell any text: the bytes, and the signs that decode to something else."""
    if _is_byte_level(content):
        return {ids[letter] for letter in tokenizers.pre_tokenizers.ByteLevel.alphabet() if letter in ids}
    return {ids[name] for name in (*BYTE_TOKENS, *_signs(content["decoder"])) if name in ids}


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    return "ByteLevel" in {*_types(content["pre_tokenizer"]), *_types(content["normalizer"])}


def _flat(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of nested sequences in order."""
    if step is None:
        return []
    for name in ("decoders", "pretokenizers", "normalizers", "processors"):
        if step["type"] == "Sequence" and name in step:
            return [inner for part in step[name] for inner in _flat(part)]
    return [step]


def _types(step: Mapping[str, Any] | None) -> list[str]:
    return [part["type"] for part in _flat(step)]


def _signs(decoder: Mapping[str, Any] | None) -> list[str]:
    """Return the strings that a decoder replaces, such as the sign for a space; "" for a regular expression."""
    found = []
    for step in _flat(decoder):
        if step["type"] == "Replace":
            found.append(step["pattern"].get("String", ""))
        elif step["type"] == "Metaspace":
            found.append(step["replacement"])
    return found


def _id_references(content: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (object, key) for every token id outside the model and the list of added tokens.

    Raises `ValueError` for an unknown post-processor.
    """
    if content["padding"] is not None:
        yield content["padding"], "pad_id"
    for step in _flat(content["post_processor"]):
        if step["type"] == "TemplateProcessing":
            for special in step["special_tokens"].values():
                yield from ((special["ids"], i) for i in range(len(special["ids"])))
        elif step["type"] in ("BertProcessing", "RobertaProcessing"):
            yield from ((step[name], 1) for name in ("sep", "cls"))
        elif step["type"] not in WITHOUT_IDS:
            raise ValueError(f"its post-processor {step['type']} is not supported")
