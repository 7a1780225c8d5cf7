"""Text to tokens and back, with the tokenizers library; chats to prompts.

`StreamDecoder` lives in `edgelm.text.detokenizer` and is importable from here too.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edgelm.bundle.bundle_folder import Bundle
from edgelm.errors import BundleError, RequestError
from edgelm.text.chat_template import ChatTemplate
from edgelm.text.detokenizer import StreamDecoder
from edgelm.text.tainted_text import RenderedPrompt, SpecialTokenFinder
from edgelm.text.token_bytes import TokenSizeBound, measure_token_size
from edgelm.text.tokenizer_file import (
    MAX_ADDED_TOKENS,
    check_numbers,
    check_replacements,
    find_regexes,
    sanitize_tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    import tokenizers

__all__ = ["StreamDecoder", "Tokenizer"]

SHORT_TEXT_LENGTH: Final = 4000
"""Characters of a text that is encoded in some milliseconds."""

BYTE: Final = re.compile("<0x[0-9A-F]{2}>")
"""How vocabularies with byte fallback call a byte."""
PROBE_LIMIT_S: Final = 0.05
"""How long a text of one letter, many times, may take where there are regular expressions: usually it is 0.1 ms."""
PROBE_LENGTHS: Final = (20, 60, 500)


class Tokenizer:
    """A tokenizer.json, its special tokens and its chat template. Safe to use from several threads.

    Parameters
    ----------
    inner
        The library's tokenizer. Truncation and padding are switched off.
    chat_template
        See `ChatTemplate`; None where the model has none.
    bos_token, eos_token
        Their texts, for the chat template.
    special_tokens
        The same by name, with any others: `{"pad_token": "<pad>"}`.
    end_tokens
        Ids that end an answer. Like special tokens, they are not recognized in the texts of a chat.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        chat_template: str | Sequence[Mapping[str, str]] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        *,
        special_tokens: Mapping[str, str] | None = None,
        end_tokens: Collection[int] = (),
        prompts_are_messages: bool | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._chat_template = chat_template
        named = (("bos_token", bos_token), ("eos_token", eos_token))
        self._special_tokens = {
            **(special_tokens or {}),
            **{name: text for name, text in named if text is not None},
        }
        self._end_tokens = frozenset(end_tokens)
        self.prompts_are_messages = chat_template is not None if prompts_are_messages is None else prompts_are_messages

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        chat_template: str | Sequence[Mapping[str, str]] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> Tokenizer:
        """Read a tokenizer.json.

        Raises
        ------
        BundleError
            When the file is missing or is no tokenizer.json.
        """
        return cls(_read(path), chat_template, bos_token, eos_token)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Tokenizer:
        """Read a bundle's tokenizer, with its chat template. Raises `BundleError`."""
        manifest = bundle.manifest
        return cls(
            _read(bundle.tokenizer, manifest.vocab_size),
            manifest.chat_template,
            special_tokens=manifest.special_tokens,
            end_tokens=manifest.eos_tokens,
            prompts_are_messages=manifest.prompts_are_messages,
        )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included. The model's logits may be wider."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @property
    def base_vocab_size(self) -> int:
        """How many tokens ordinary text can give."""
        return int(self._inner.get_vocab_size(with_added_tokens=False))

    @cached_property
    def byte_tokens(self) -> Mapping[int, int]:
        """Token ids of `<0x00>` to `<0xFF>` and their bytes, of a byte-fallback vocabulary; else empty."""
        decoder = self._inner.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return {}
        ids = {self._inner.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return {token: byte for token, byte in ids.items() if token is not None}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text. Special tokens spelled out in it are recognized, as in transformers.

        Parameters
        ----------
        text
            Anything that can be encoded as UTF-8.
        add_special_tokens
            Whether to add those of the tokenizer's own template, such as a leading bos. False for a rendered
            chat, whose template has written them already.

        Raises
        ------
        RequestError
            With code "bad_request" when the text holds lone surrogates, or the tokenizer has no tokens for it.
        """
        _check_unicode(text)
        return _ids(self._inner, text, add_special_tokens)

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of a text that goes on from another: no special ones are added, and no space before it.

        Raises `RequestError` as `encode` does.
        """
        return self.encode_prompt(RenderedPrompt(text), is_continuation=True)

    def encode_prompt(self, prompt: RenderedPrompt, *, is_continuation: bool = False) -> list[int]:
        """Return the tokens of a rendered chat. Special tokens that a message spells out stay text.

        With `is_continuation` it goes on from another text: no space is put before it. Raises `RequestError` as
        `encode` does.
        """
        if not is_continuation:
            return self._encode_rendered(prompt)
        start = self.encode("\n", add_special_tokens=False)  # takes the space that many put before what they are given
        whole = self._encode_rendered(prompt.with_prefix("\n"))
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return self._encode_rendered(prompt)  # a tokenizer that joins line breaks adds no space

    def _encode_rendered(self, prompt: RenderedPrompt) -> list[int]:
        renamed = self._rename(prompt) if prompt.tainted_positions else None
        if renamed is None:
            return self.encode(prompt.text, add_special_tokens=False)
        _check_unicode(renamed)
        return _ids(self._renamed_tokenizer, renamed, False)

    def check_length(self, text: str, context: int) -> None:
        """Raise `RequestError` for a text that has more tokens than `context` whatever it says: it need not be encoded.

        Nothing is checked for tokenizers that may drop some of a text: see `tokenbytes`.
        """
        if len(text) <= max(context, SHORT_TEXT_LENGTH) or self._token_size_bound is None:
            return
        min_tokens = self._token_size_bound.min_tokens(text)
        if min_tokens >= context:
            raise RequestError(
                "bad_request",
                f"the prompt has at least {min_tokens} tokens, the context holds {context} with at least one for the"
                " answer: shorten the prompt or load with a longer context",
            )

    @cached_property
    def _token_size_bound(self) -> TokenSizeBound | None:
        return measure_token_size(self._inner)

    def needs_preparation_for(self, text: str) -> bool:
        """Whether a text spells a special token for the first time, which takes up to a second to prepare for."""
        if "_renamed_tokenizer" in self.__dict__ or self._chat_template is None:
            return False
        return any(token in self._placeholders for _, token in self._added.find(text))

    def _rename(self, prompt: RenderedPrompt) -> str | None:
        """Return a prompt with the special tokens of the template renamed as in `_renamed_tokenizer`.

        None where a message spells no special token: then nothing has to be told apart.
        """
        text, parts, kept, at, spelled = prompt.text, [], 0, 0, False
        for start, token in self._added.find(text):
            end = start + len(token)
            if start < at:
                continue
            if token in self._placeholders:
                if prompt.is_tainted(start, end):
                    spelled = True
                    continue
                parts += [text[kept:start], self._placeholders[token]]
                kept = end
            at = end
        return "".join([*parts, text[kept:]]) if spelled else None

    @cached_property
    def _added(self) -> SpecialTokenFinder:
        """Every added token: the library looks for them before anything else."""
        return SpecialTokenFinder([token.content for token in self._inner.get_added_tokens_decoder().values()])

    @cached_property
    def _placeholders(self) -> Mapping[str, str]:
        """The texts that make a special token, and what stands in for each where the template has written it.

        Nobody can spell those: they hold a number that is drawn anew in every process.
        """
        key = secrets.token_hex(8)
        return {text: f"\ufdd0{key}.{i}\ufdd1" for i, text in enumerate(sorted(self._control))}

    @cached_property
    def _control(self) -> frozenset[str]:
        """Texts of the tokens that steer the model: special ones, and those that end an answer."""
        named = set(self._special_tokens.values())
        return frozenset(
            token.content
            for i, token in self._inner.get_added_tokens_decoder().items()
            if (token.special or i in self._end_tokens or token.content in named)
            and token.content.strip()
            and not BYTE.fullmatch(token.content)
        )

    @cached_property
    def _renamed_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer with its special tokens under other names, so that their texts are texts like any other.

        Made only when a message first spells one: it takes as much memory as the tokenizer itself.
        """
        from tokenizers import Tokenizer as Inner

        content, names = json.loads(self._inner.to_str()), self._placeholders
        for token in content["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model, vocab = content["model"], content["model"]["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {names.get(text, text): i for text, i in vocab.items()}
        else:
            model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
        if "merges" in model:
            pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
            model["merges"] = [p for p in pairs if not names.keys() & {*p, "".join(p)}]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        content["post_processor"] = None  # a template has written what begins and ends a prompt
        return Inner.from_str(json.dumps(content))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; special ones and ids outside the vocabulary have none."""
        with _panics_are_errors():
            return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation, up to where the assistant speaks. Raises as `build_prompt` does."""
        return self.build_prompt(messages, tools, template_vars).text

    def build_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Return the prompt of a conversation, up to where the assistant speaks: see `ChatTemplate.render`.

        Raises
        ------
        RequestError
            With code "bad_request" when the model has no chat template, or the template refuses the messages;
            "internal" when the template itself is broken.
        """
        if self._chat_template is None:
            raise RequestError("bad_request", "this model has no chat template: send a prompt instead of messages")
        return self._chat.render(messages, tools, template_vars)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._chat_template or "", self._special_tokens, self._control)


def _read(path: str | Path, vocab_size: int | None = None) -> tokenizers.Tokenizer:
    """Read a tokenizer.json; with `vocab_size` without added tokens that lie outside it. Raises `BundleError`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it starts threads, and complains when we fork
    from tokenizers import Tokenizer as Inner

    if not Path(path).is_file():
        raise BundleError(f"{path}: no such file; a bundle holds its tokenizer.json")
    try:
        check_numbers(Path(path))
        with _panics_are_errors():
            inner = Inner.from_file(str(path))
            if vocab_size is not None and max(inner.get_added_tokens_decoder(), default=0) >= vocab_size:
                inner = Inner.from_str(sanitize_tokenizer(Path(path).read_text(encoding="utf-8"), vocab_size))
            _check(inner)
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"{path}: not a tokenizer.json that we can read: {_in_one_line(error)}") from error
    return inner


def _ids(inner: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Return the tokens of a text. Other threads go on meanwhile: only the library's call for many texts lets them."""
    with _panics_are_errors():
        return list(inner.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)


def _check(inner: tokenizers.Tokenizer) -> None:
    """Raise `ValueError` for a tokenizer that makes long texts of short ones, or takes long for them."""
    if inner.num_special_tokens_to_add(False) > MAX_ADDED_TOKENS:
        raise ValueError(f"it puts more than {MAX_ADDED_TOKENS} tokens around every text")
    parts = [part and part.__getstate__() for part in (inner.normalizer, inner.pre_tokenizer, inner.decoder)]
    check_replacements(parts[0], parts[2])
    found = "".join(find_regexes(*parts))
    if not found:
        return
    letters = sorted({character for character in found if character.isalnum()})[:12]
    tail = "".join(letters)  # some patterns are tried only where what they end with is there
    for length in PROBE_LENGTHS:
        for letter in (*letters, " ", "\n", "a", "1", "."):
            begun = time.thread_time()
            ids = inner.encode(f"{letter * length}!{tail}\x01", add_special_tokens=False).ids
            inner.decode(ids)
            if time.thread_time() - begun > PROBE_LIMIT_S:
                raise ValueError("its regular expressions take too long for short texts")


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Make a request's error of what the library raises: plain exceptions, and panics, which are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if not (type(error) is Exception or type(error).__name__ == "PanicException"):
            raise
        raise RequestError("bad_request", f"the model's tokenizer fails: {_in_one_line(error)}") from error


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("bad_request", f"the text is not valid Unicode: {error.reason}") from error
