"""Builds a checkpoint's tokenizer as its class in transformers does: special tokens from all files, bos and eos added.

The rules are those of transformers 4.57: `PreTrainedTokenizerBase._from_pretrained` for special tokens, and
`update_post_processor` of LlamaTokenizerFast, GemmaTokenizerFast and others for the start and end of a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import tokenizers

from edgelm.errors import CheckpointError
from edgelm.text.tokenizer_file import check_numbers_of_text, sanitize_tokenizer

from .checkpoint import Checkpoint

SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token")

LLAMA: Final = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GPT2: Final = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
CLASS_TOKENS: Final[dict[str, dict[str, str]]] = {
    "LlamaTokenizer": LLAMA,
    "CodeLlamaTokenizer": LLAMA,
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "pad_token": "<PAD>",
    },
    "GPTNeoXTokenizer": GPT2,
    "GPT2Tokenizer": GPT2,
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
"""Special tokens of a class if no file names them."""

ADDS_BOS: Final = {
    "LlamaTokenizer": True,
    "CodeLlamaTokenizer": True,
    "GemmaTokenizer": True,
    "CohereTokenizer": True,
    "GPTNeoXTokenizer": False,
}
"""Classes that replace the post-processor of tokenizer.json, and their default of add_bos_token."""

CLASS_OF_MODEL_TYPE: Final = {
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "olmo2": "GPTNeoXTokenizer",
    "phi3": "LlamaTokenizer",
}
"""The class for a model type, if the files set add_bos_token or add_eos_token but name no class."""


def with_special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json with the special tokens of special_tokens_map.json.

    The map overrides a tokenizer_config.json of the older form, without `added_tokens_decoder`. To the newer form it
    only adds missing tokens.
    """
    given = {name: special_map[name] for name in SPECIAL_TOKENS if special_map.get(name) is not None}
    return {**given, **config} if "added_tokens_decoder" in config else {**config, **given}


def apply_tokenizer_class(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the bundle's tokenizer.

    tokenizer_text has no padding, no truncation, no added token without a row in the model, and a post-processor that
    adds bos and eos as the tokenizer's class does. tokenizer_config has the special tokens of the class if the files
    name none. Raises `CheckpointError` for a switch that is not a boolean, and for numbers that would exhaust memory; a
    tokenizer.json that cannot be read for other reasons is left unchanged.
    """
    vocab_size = checkpoint.config.get("vocab_size")
    text = checkpoint.tokenizer_text
    if isinstance(vocab_size, int) and not isinstance(vocab_size, bool):
        text = sanitize_tokenizer(text, vocab_size)
    try:
        check_numbers_of_text(text)
    except json.JSONDecodeError:
        return checkpoint
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.tokenizer_path}: not a supported tokenizer.json: {error}") from error
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception:  # noqa: BLE001 the library raises plain Exception; `check_tokenizer` reports the reason
        return checkpoint
    inner.no_padding()
    inner.no_truncation()
    config = dict(checkpoint.tokenizer_config)
    for name, token in CLASS_TOKENS.get(_class_of(checkpoint, fallback=False) or "", {}).items():
        if name not in config and inner.token_to_id(token) is not None:
            config[name] = token
    processor = _post_processor(checkpoint, config, inner)
    if processor is not None:
        text = json.dumps({**json.loads(text), "post_processor": processor}, ensure_ascii=False)
    return replace(checkpoint, tokenizer_config=config, tokenizer_text=text)


def special_token(config: Mapping[str, Any], name: str) -> str | None:
    """Return the text of a special token in a tokenizer_config.json."""
    token = config.get(name)
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _post_processor(
    checkpoint: Checkpoint, config: Mapping[str, Any], inner: tokenizers.Tokenizer
) -> dict[str, Any] | None:
    """Return the replacement of tokenizer.json's post-processor; None if that already does the same."""
    add_bos, add_eos = (_switch(checkpoint, config, name) for name in ("add_bos_token", "add_eos_token"))
    kind = _class_of(checkpoint, fallback=add_bos is not None or add_eos is not None)
    bos, eos = (_token(checkpoint, config, inner, name) for name in ("bos_token", "eos_token"))
    bare, full = (list(inner.encode("a", add_special_tokens=each).ids) for each in (False, True))
    if kind in ADDS_BOS:
        adds = ADDS_BOS[kind] if add_bos is None else add_bos
        if (adds and bos is None) or (add_eos and eos is None):
            return None  # there is no such token to add; keep that of tokenizer.json
        starts, ends = bos if adds else None, eos if add_eos else None
    elif add_bos and bos is not None and full[:1] != [bos[1]]:
        starts = bos
        ends = eos if eos is not None and full[-1:] == [eos[1]] and bare[-1:] != [eos[1]] else None
    else:
        return None
    if full == [*([starts[1]] if starts else []), *bare, *([ends[1]] if ends else [])]:
        return None
    return _template(starts, ends)


def _template(starts: tuple[str, int] | None, ends: tuple[str, int] | None) -> dict[str, Any]:
    """Return the TemplateProcessing of a tokenizer.json that puts tokens, (text, id), around each text."""

    def part(sequence: str, type_id: int) -> list[dict[str, Any]]:
        around = [
            None if token is None else {"SpecialToken": {"id": token[0], "type_id": type_id}}
            for token in (starts, ends)
        ]
        parts = [around[0], {"Sequence": {"id": sequence, "type_id": type_id}}, around[1]]
        return [each for each in parts if each is not None]

    special = {name: {"id": name, "ids": [token], "tokens": [name]} for name, token in filter(None, (starts, ends))}
    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": special,
    }


def _class_of(checkpoint: Checkpoint, *, fallback: bool) -> str | None:
    """Return the tokenizer's class without `Fast`; with `fallback`, that of the model type if none is named."""
    named = checkpoint.tokenizer_config.get("tokenizer_class") or checkpoint.config.get("tokenizer_class")
    if isinstance(named, str):
        return named.removesuffix("Fast")
    return CLASS_OF_MODEL_TYPE.get(str(checkpoint.config.get("model_type"))) if fallback else None


def _switch(checkpoint: Checkpoint, config: Mapping[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(
            f"{checkpoint.path / 'tokenizer_config.json'}: {name} must be true, false or null, got {value!r:.80}"
        )
    return value


def _token(
    checkpoint: Checkpoint, config: Mapping[str, Any], inner: tokenizers.Tokenizer, name: str
) -> tuple[str, int] | None:
    """Return a special token's (text, id) if both the tokenizer and the model have it."""
    text = special_token(config, name)
    found = None if text is None else inner.token_to_id(text)
    vocab_size = checkpoint.config.get("vocab_size")
    if text is None or found is None or (isinstance(vocab_size, int) and found >= vocab_size):
        return None
    return text, int(found)
