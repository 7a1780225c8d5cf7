"""The text of a static prefix: reads it from a file and converts it to tokens.

The file holds text, or the messages that begin a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from edgelm.errors import EdgelmError, RequestError
from edgelm.text.tokenizer import Tokenizer

PrefixText = str | Sequence[Mapping[str, Any]]
"""Text, or messages for the chat template."""

PROBES: Final = ("a", "7")
"""Two possible next user messages: text that depends on them is not part of the prefix."""


def read_prefix_text(file: str | Path) -> PrefixText:
    """Read the text or messages of a static prefix from a file.

    A JSON list of objects holds messages; everything else is text. A file named *.json must hold messages. Raises
    `EdgelmError` if the file cannot be read, is empty, or is a *.json file without messages.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise EdgelmError(f"the prefix {file} cannot be read: {reason}") from error
    if not text.strip():
        raise EdgelmError(f"the prefix {file} is empty: it must hold text, or a JSON list of messages")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return value
    if Path(file).suffix.lower() == ".json":
        raise EdgelmError(
            f'the prefix {file} must be a JSON list of messages, [{{"role": "system", "content": "..."}}]'
        )
    return text


def tokenize_prefix(prefix_text: PrefixText, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that every prompt with this prefix begins with.

    Text is encoded like a prompt, with the start token if the tokenizer adds one. For messages the result is the common
    prefix of two prompts that continue them with different user messages. Raises `EdgelmError` if the chat template is
    missing or refuses the messages, or if the common prefix is empty.
    """
    try:
        if isinstance(prefix_text, str):
            return tokenizer.encode(prefix_text)
        following = ([*prefix_text, {"role": "user", "content": probe}] for probe in PROBES)
        one, other = (tokenizer.encode_prompt(tokenizer.build_prompt(chat)) for chat in following)
    except RequestError as error:
        raise EdgelmError(f"the prefix cannot be converted to tokens: {error}") from error
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    if shared == 0:
        raise EdgelmError(
            "the prefix is empty: the model's chat template does not begin the prompt with these messages"
        )
    return one[:shared]


def check_prefix_tokens(tokens: Sequence[int], *, context: int, vocab_size: int, long_from: int | None) -> None:
    """Raise `EdgelmError` unless prompts can begin with these tokens: at least one position must follow them.

    `context` and `long_from` are lengths in tokens. A sequence longer than `long_from` (LongRoPE) uses other rotary
    tables, for which the prefix would be wrong.
    """
    limit = min(context, context if long_from is None else long_from) - 1
    if not tokens:
        raise EdgelmError("the prefix has no tokens")
    if len(tokens) > limit:
        raise EdgelmError(
            f"the prefix has {len(tokens)} tokens; the context allows at most {max(limit, 0)}: shorten it"
        )
    bad = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise EdgelmError(f"the prefix has the token {bad}, which is outside the vocabulary [0, {vocab_size})")
