"""Text to tokens and back with the tokenizers library; messages to prompts.

Owns the checks of an untrusted tokenizer.json that need the library. `StreamDecoder` can be imported from here too.
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
"""Characters of a text that is encoded within a few milliseconds."""

BYTE: Final = re.compile("<0x[0-9A-F]{2}>")
"""Name of a byte in vocabularies with byte fallback."""
PROBE_LIMIT_S: Final = 0.05
"""Limit for encoding one repeated letter if the tokenizer has regular expressions; usually it takes 0.1 ms."""
PROBE_LENGTHS: Final = (20, 60, 500)


class Tokenizer:
    """A tokenizer.json, its special tokens and its chat template. Safe to use from several threads.

    Parameters
    ----------
    inner
        The library's tokenizer. Truncation and padding are disabled in place.
    chat_template
        See `ChatTemplate`; None if the model has none.
    bos_token, eos_token
        Texts of these tokens, for the chat template.
    special_tokens
        Texts of these and other tokens by name: `{"pad_token": "<pad>"}`.
    end_tokens
        Ids that end a completion. Like special tokens, they are not recognized in the texts of messages.
    prompts_are_messages
        Whether a prompt without messages is a user message; None means yes if there is a chat template.
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
            If the file is missing or not a valid tokenizer.json.
        """
        return cls(_read_tokenizer(path), chat_template, bos_token, eos_token)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Tokenizer:
        """Read a bundle's tokenizer and chat template. Raises `BundleError` if the tokenizer.json is not valid."""
        manifest = bundle.manifest
        return cls(
            _read_tokenizer(bundle.tokenizer, manifest.vocab_size),
            manifest.chat_template,
            special_tokens=manifest.special_tokens,
            end_tokens=manifest.eos_tokens,
            prompts_are_messages=manifest.prompts_are_messages,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included. The model's logits may be wider."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))

    @property
    def base_vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return int(self._inner.get_vocab_size(with_added_tokens=False))

    @cached_property
    def byte_tokens(self) -> Mapping[int, int]:
        """Bytes by token id for `<0x00>` to `<0xFF>` of a byte-fallback vocabulary; else empty."""
        decoder = self._inner.decoder
        if decoder is None or b'"ByteFallback"' not in decoder.__getstate__():
            return {}
        ids = {self._inner.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return {token: byte for token, byte in ids.items() if token is not None}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text. Texts of special tokens in it are recognized, as in transformers.

        Parameters
        ----------
        text
            Any text that can be encoded as UTF-8.
        add_special_tokens
            Whether to add the tokens of the post-processor, such as a leading start token. False for a rendered
            conversation: its template has already written them.

        Raises
        ------
        RequestError
            With code "bad_request" if the text has lone surrogates, or the tokenizer has no tokens for it.
        """
        _check_unicode(text)
        return _encode(self._inner, text, add_special_tokens)

    def encode_continuation(self, text: str) -> list[int]:
        """Return the tokens of a text that continues another one: no special tokens are added, and no leading space.

        Raises `RequestError` as `encode` does.
        """
        return self.encode_prompt(RenderedPrompt(text), is_continuation=True)

    def encode_prompt(self, prompt: RenderedPrompt, *, is_continuation: bool = False) -> list[int]:
        """Return the tokens of a rendered conversation. Texts of special tokens in a message stay text.

        With `is_continuation` it continues another text: no leading space is added. Raises `RequestError` as `encode`
        does.
        """
        if not is_continuation:
            return self._encode_rendered(prompt)
        start = self.encode("\n", add_special_tokens=False)  # absorbs the space that many tokenizers add before a text
        whole = self._encode_rendered(prompt.with_prefix("\n"))
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return self._encode_rendered(prompt)  # a tokenizer that merges line breaks adds no space

    def _encode_rendered(self, prompt: RenderedPrompt) -> list[int]:
        renamed = self._rename(prompt) if prompt.tainted_positions else None
        if renamed is None:
            return self.encode(prompt.text, add_special_tokens=False)
        _check_unicode(renamed)
        return _encode(self._renamed_tokenizer, renamed, False)

    def check_length(self, text: str, context: int) -> None:
        """Raise `RequestError` if a text surely has at least `context` tokens; it is not encoded.

        There is no check for tokenizers that may drop text: see `token_bytes`.
        """
        if len(text) <= max(context, SHORT_TEXT_LENGTH) or self._token_size_bound is None:
            return
        min_tokens = self._token_size_bound.min_tokens(text)
        if min_tokens >= context:
            raise RequestError(
                "bad_request",
                f"the prompt has at least {min_tokens} tokens, the context holds {context} including one for the"
                " completion: shorten the prompt or load with a longer context",
            )

    @cached_property
    def _token_size_bound(self) -> TokenSizeBound | None:
        return measure_token_size(self._inner)

    def needs_preparation_for(self, text: str) -> bool:
        """Whether the text has a special token while the renamed tokenizer is not built yet, which takes up to 1 s."""
        if "_renamed_tokenizer" in self.__dict__ or self._chat_template is None:
            return False
        return any(token in self._placeholders for _, token in self._added_token_finder.find(text))

    def _rename(self, prompt: RenderedPrompt) -> str | None:
        """Return the prompt with the template's special tokens renamed as in `_renamed_tokenizer`.

        None if no message contains the text of a special token.
        """
        text, parts, kept, at, has_tainted_token = prompt.text, [], 0, 0, False
        for start, token in self._added_token_finder.find(text):
            end = start + len(token)
            if start < at:
                continue
            if token in self._placeholders:
                if prompt.is_tainted(start, end):
                    has_tainted_token = True
                    continue
                parts += [text[kept:start], self._placeholders[token]]
                kept = end
            at = end
        return "".join([*parts, text[kept:]]) if has_tainted_token else None

    @cached_property
    def _added_token_finder(self) -> SpecialTokenFinder:
        """Finder of all added tokens: the library searches for them before any other step."""
        return SpecialTokenFinder([token.content for token in self._inner.get_added_tokens_decoder().values()])

    @cached_property
    def _placeholders(self) -> Mapping[str, str]:
        """Placeholder text by special token, for the places where the template writes the token.

        A message cannot contain a placeholder: each process draws a random number for it.
        """
        key = secrets.token_hex(8)
        return {text: f"\ufdd0{key}.{i}\ufdd1" for i, text in enumerate(sorted(self._control_texts))}

    @cached_property
    def _control_texts(self) -> frozenset[str]:
        """Texts of control tokens: special tokens and those that end a completion."""
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
        """The tokenizer with placeholders as special tokens, so that the tokens' own texts are ordinary text.

        Built when a message first contains such a text: it takes as much memory as the tokenizer itself.
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
        content["post_processor"] = None  # the template has already written start and end tokens
        return Inner.from_str(json.dumps(content))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; special tokens and ids outside the vocabulary have no text."""
        with _convert_panics():
            return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of `build_prompt`. Raises as `build_prompt` does."""
        return self.build_prompt(messages, tools, template_vars).text

    def build_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> RenderedPrompt:
        """Return the prompt of a conversation, up to the start of the assistant's message: see `ChatTemplate.render`.

        Raises
        ------
        RequestError
            With code "bad_request" if the model has no chat template, or the template refuses the messages;
            "internal" if the template is not valid.
        """
        if self._chat_template is None:
            raise RequestError("bad_request", "this model has no chat template: send a prompt instead of messages")
        return self._chat.render(messages, tools, template_vars)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._chat_template or "", self._special_tokens, self._control_texts)


def _read_tokenizer(path: str | Path, vocab_size: int | None = None) -> tokenizers.Tokenizer:
    """Read a tokenizer.json; with `vocab_size`, without added tokens outside it. Raises `BundleError`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it starts threads, and warns on fork
    from tokenizers import Tokenizer as Inner

    if not Path(path).is_file():
        raise BundleError(f"{path}: no such file; a bundle must have a tokenizer.json")
    try:
        check_numbers(Path(path))
        with _convert_panics():
            inner = Inner.from_file(str(path))
            if vocab_size is not None and max(inner.get_added_tokens_decoder(), default=0) >= vocab_size:
                inner = Inner.from_str(sanitize_tokenizer(Path(path).read_text(encoding="utf-8"), vocab_size))
            _check_cost(inner)
    except Exception as error:  # the library raises plain Exception
        raise BundleError(f"{path}: not a valid tokenizer.json: {_in_one_line(error)}") from error
    return inner


def _encode(inner: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Return the tokens of a text. Only the library's call for several texts releases the GIL."""
    with _convert_panics():
        return list(inner.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)


def _check_cost(inner: tokenizers.Tokenizer) -> None:
    """Raise `ValueError` for a tokenizer that turns short texts into long ones, or is slow for short texts."""
    if inner.num_special_tokens_to_add(False) > MAX_ADDED_TOKENS:
        raise ValueError(f"it adds more than {MAX_ADDED_TOKENS} tokens around every text")
    parts = [part and part.__getstate__() for part in (inner.normalizer, inner.pre_tokenizer, inner.decoder)]
    check_replacements(parts[0], parts[2])
    found = "".join(find_regexes(*parts))
    if not found:
        return
    letters = sorted({character for character in found if character.isalnum()})[:12]
    tail = "".join(letters)  # some patterns are tried only if their last character occurs
    for length in PROBE_LENGTHS:
        for letter in (*letters, " ", "\n", "a", "1", "."):
            begun = time.thread_time()
            ids = inner.encode(f"{letter * length}!{tail}\x01", add_special_tokens=False).ids
            inner.decode(ids)
            if time.thread_time() - begun > PROBE_LIMIT_S:
                raise ValueError("its regular expressions are too slow for short texts")


@contextmanager
def _convert_panics() -> Iterator[None]:
    """Convert the library's errors to `RequestError`: plain exceptions, and panics, which are not `Exception`s."""
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
