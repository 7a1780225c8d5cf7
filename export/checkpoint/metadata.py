"""Reads the parts of a checkpoint besides its weights: special tokens, chat template, default sampling."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from math import inf
from typing import Any, Final, Literal

import tokenizers

from edgelm._version import __version__
from edgelm.errors import CheckpointError, RequestError
from edgelm.text.chat_template import ChatTemplate
from edgelm.text.tokenizer import Tokenizer
from edgelm.types import SamplingParams

from . import Checkpoint
from .tokenizer_files import SPECIAL_TOKENS, special_token

PROBE_QUESTION: Final = "What is on the table?"
PROBE_ANSWER: Final = "A cup of tea."


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that write a bundle."""
    return {"edgelm": __version__, **{name: version(name) for name in ("numpy", "onnx", "onnxruntime")}}


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the text of each special token in the tokenizer's files."""
    found = {name: special_token(checkpoint.tokenizer_config, name) for name in SPECIAL_TOKENS}
    return {name: token for name, token in found.items() if token is not None}


def check_tokenizer(checkpoint: Checkpoint, vocab_size: int) -> None:
    """Raise `CheckpointError` if the tokenizer cannot be read, or has tokens that the model does not have.

    Added tokens past the vocabulary are allowed: a bundle's tokenizer leaves them out.
    """
    try:
        inner = _load_tokenizer(checkpoint.tokenizer_text)
        tokenizer = Tokenizer(inner)
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{checkpoint.tokenizer_path}: not a supported tokenizer: {error}") from error
    if tokenizer.base_vocab_size > vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer_path} has {tokenizer.base_vocab_size} tokens, the configuration a vocab_size of"
            f" {vocab_size}: they do not belong together"
        )
    highest = max(inner.get_vocab(with_added_tokens=False).values(), default=0)
    if highest >= vocab_size:
        raise CheckpointError(
            f"{checkpoint.tokenizer_path} has the token {highest}, the configuration a vocab_size of {vocab_size}:"
            " they do not belong together"
        )


def bos_token(checkpoint: Checkpoint) -> int | None:
    """Return the id that starts a text; None if the checkpoint has none."""
    ids = _ids(checkpoint, "bos_token_id")
    return ids[0] if ids else None


def eos_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the ids that end an answer.

    They are those of generation_config.json and config.json, the tokenizer's eos, and the token with which the chat
    template ends an assistant message: published checkpoints may lack any of these.
    """
    ids = [*_checked_ids(checkpoint, "eos_token_id", checkpoint.generation_config.get("eos_token_id"))]
    ids += _checked_ids(checkpoint, "eos_token_id", checkpoint.config.get("eos_token_id"))
    inner = _load_tokenizer(checkpoint.tokenizer_text)
    for token in (special_token(checkpoint.tokenizer_config, "eos_token"), end_of_turn(checkpoint)):
        found = None if token is None else inner.token_to_id(token)
        if found is not None and found < _vocab_size(checkpoint):
            ids.append(int(found))
    return tuple(dict.fromkeys(ids))


def end_of_turn(checkpoint: Checkpoint) -> str | None:
    """Return the added token that the chat template writes after an answer, or None."""
    template = chat_template(checkpoint)
    if template is None:
        return None
    messages = [{"role": "user", "content": PROBE_QUESTION}, {"role": "assistant", "content": PROBE_ANSWER}]
    try:
        text = ChatTemplate(template, special_tokens(checkpoint)).render(messages, generation_prompt=False).text
    except RequestError:  # reported where the template is used
        return None
    behind = text.rpartition(PROBE_ANSWER)[2].lstrip() if PROBE_ANSWER in text else ""
    added = {token.content for token in _load_tokenizer(checkpoint.tokenizer_text).get_added_tokens_decoder().values()}
    return max((token for token in added if token.strip() and behind.startswith(token)), key=len, default=None)


def required_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the ids that a pruned vocabulary must keep: those that start, end and pad a text."""
    bos, pad = bos_token(checkpoint), _pad_token(checkpoint)
    return tuple(token for token in (bos, *eos_tokens(checkpoint), pad) if token is not None)


def chat_template(checkpoint: Checkpoint) -> str | None:
    """Return the Jinja chat template, of several the one named `default`; None if there is none."""
    template = checkpoint.tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError("tokenizer_config.json: chat_template must be a string or a list with a default")
    return template


def bare_prompt(checkpoint: Checkpoint) -> Literal["message", "text"] | None:
    """Return how a prompt without a conversation is handled; None if there is no chat template.

    It is plain text if the tokenizer adds the same tokens around it as the chat template around one message, as for a
    distilled student: such a model answers single sentences.
    """
    template = chat_template(checkpoint)
    if template is None:
        return None
    tokenizer = Tokenizer(
        _load_tokenizer(checkpoint.tokenizer_text), template, special_tokens=special_tokens(checkpoint)
    )
    try:
        message = tokenizer.encode_prompt(tokenizer.build_prompt([{"role": "user", "content": PROBE_QUESTION}]))
    except RequestError:
        return "message"
    return "text" if message == tokenizer.encode(PROBE_QUESTION) else "message"


def sampling(checkpoint: Checkpoint) -> SamplingParams:
    """Return the default sampling of generation_config.json with transformers' meaning: greedy unless do_sample.

    A null option is off, like a missing one; only a missing top_k is transformers' default of 50.
    """
    generation = checkpoint.generation_config
    chosen: dict[str, Any] = {}
    if generation.get("do_sample"):
        top_k = generation.get("top_k", 50)
        chosen = {"temperature": _given(generation, "temperature", 1.0), "top_k": 0 if top_k in (None, -1) else top_k}
        for name, off in (("top_p", 1.0), ("min_p", 0.0)):
            chosen[name] = _given(generation, name, off)
    chosen["repetition_penalty"] = generation.get("repetition_penalty")
    chosen["max_tokens"] = generation.get("max_new_tokens")
    stops = generation.get("stop_strings") or []
    if not isinstance(stops, (str, list)):
        raise CheckpointError(f"generation_config.json: stop_strings must be a list of strings, got {stops!r:.80}")
    chosen["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
    try:
        return SamplingParams(**{name: value for name, value in chosen.items() if value is not None})
    except RequestError as error:
        raise CheckpointError(f"generation_config.json: {error}") from error


def _given(options: Mapping[str, Any], name: str, off: float) -> Any:
    value = options.get(name)
    return off if value is None else value


def _pad_token(checkpoint: Checkpoint) -> int | None:
    """Return the padding token if the model has a row for it; -1 and vocab_size mean that it has none."""
    found = [checkpoint.generation_config.get("pad_token_id"), checkpoint.config.get("pad_token_id")]
    ids = [token for token in found if isinstance(token, int) and not isinstance(token, bool)]
    return next((token for token in ids if 0 <= token < _vocab_size(checkpoint)), None)


def _ids(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    value = checkpoint.generation_config.get(name)
    return _checked_ids(checkpoint, name, checkpoint.config.get(name) if value is None else value)


def _checked_ids(checkpoint: Checkpoint, name: str, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    vocabulary = _vocab_size(checkpoint)
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(f"{name} must be a token id or a list of them, got {value!r:.80}")
        if token >= vocabulary:
            raise CheckpointError(f"{name} {token} is outside the vocabulary of {vocabulary}")
    return tuple(ids)


def _vocab_size(checkpoint: Checkpoint) -> float:
    """Return the model's vocab_size; infinity if the configuration has none."""
    value = checkpoint.config.get("vocab_size")
    return value if isinstance(value, int) and not isinstance(value, bool) else inf


@lru_cache(maxsize=2)
def _load_tokenizer(tokenizer_text: str) -> tokenizers.Tokenizer:
    """Return the library's tokenizer; the last two are cached."""
    return tokenizers.Tokenizer.from_str(tokenizer_text)
