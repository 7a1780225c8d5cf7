"""What a checkpoint says beside its weights: special tokens, chat template, default sampling."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final

import tokenizers

from edgelm._version import __version__
from edgelm.errors import CheckpointError, RequestError
from edgelm.messages import SamplingParams
from edgelm.tokenizer import Tokenizer

from .checkpoint import Checkpoint

SPECIAL: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


def made_with() -> dict[str, str]:
    """Versions of what writes a bundle."""
    return {"edgelm": __version__, **{name: version(name) for name in ("numpy", "onnx", "onnxruntime")}}


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the text of each special token that tokenizer_config.json names."""
    found: dict[str, str] = {}
    for name in SPECIAL:
        token = checkpoint.tokenizer_config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def check_tokenizer(checkpoint: Checkpoint, vocab_size: int) -> None:
    """Raise `CheckpointError` when the tokenizer cannot be read, or gives tokens that the model does not have.

    Added tokens past the vocabulary are let pass: text has them only where someone spells them out.
    """
    try:
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(checkpoint.tokenizer_text))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{checkpoint.tokenizer}: not a tokenizer that we can read: {error}") from error
    if tokenizer.base_vocab_size > vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer} has {tokenizer.base_vocab_size} tokens, the configuration a vocab_size of"
            f" {vocab_size}: they do not belong together"
        )


def bos_token(checkpoint: Checkpoint) -> int | None:
    """Return the id that starts a text, where the checkpoint has one."""
    ids = _ids(checkpoint, "bos_token_id")
    return ids[0] if ids else None


def eos_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the ids that end an answer: generation_config.json's list, else config.json's."""
    return _ids(checkpoint, "eos_token_id")


def required_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the ids that a smaller vocabulary must keep: those that start, end and pad a text."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return tuple(token for name in names for token in _ids(checkpoint, name))


def chat_template(checkpoint: Checkpoint) -> str | None:
    """Return the Jinja text that renders a conversation; of several named ones the one named `default`."""
    template = checkpoint.tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError("tokenizer_config.json: chat_template must be a string or a list with a default")
    return template


def sampling(checkpoint: Checkpoint) -> SamplingParams:
    """Return the default sampling of generation_config.json, with transformers' meaning: greedy unless do_sample."""
    generation = checkpoint.generation
    chosen: dict[str, Any] = {}
    if generation.get("do_sample"):
        chosen = {"temperature": generation.get("temperature", 1.0), "top_k": generation.get("top_k", 50)}
        for name, off in (("top_p", 1.0), ("min_p", 0.0)):
            chosen[name] = generation.get(name, off)
    chosen["repetition_penalty"] = generation.get("repetition_penalty")
    chosen["max_tokens"] = generation.get("max_new_tokens")
    try:
        return SamplingParams(**{name: value for name, value in chosen.items() if value is not None})
    except RequestError as error:
        raise CheckpointError(f"generation_config.json: {error}") from error


def _ids(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    value = checkpoint.generation.get(name)
    if value is None:
        value = checkpoint.config.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    vocabulary = checkpoint.config.get("vocab_size")
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(f"{name} must be a token id or a list of them, got {value!r}")
        if isinstance(vocabulary, int) and token >= vocabulary:
            raise CheckpointError(f"{name} {token} lies outside the vocabulary of {vocabulary}")
    return tuple(ids)
