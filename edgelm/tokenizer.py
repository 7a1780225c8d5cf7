"""Text to tokens and back, with the tokenizers library; chats to prompts.

`StreamDecoder` lives in `edgelm.detokenizer` and is importable from here too.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.bundle import Bundle
from edgelm.chat import ChatTemplate
from edgelm.detokenizer import StreamDecoder
from edgelm.errors import BundleError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import tokenizers

__all__ = ["StreamDecoder", "Tokenizer"]


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
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        chat_template: str | Sequence[Mapping[str, str]] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._chat_template = chat_template
        self._special_tokens = {
            name: text for name, text in (("bos_token", bos_token), ("eos_token", eos_token)) if text is not None
        }

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
        from tokenizers import Tokenizer as Inner

        if not Path(path).is_file():
            raise BundleError(f"{path}: no such file; a bundle holds its tokenizer.json")
        try:
            inner = Inner.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path}: not a tokenizer.json that we can read: {error}") from error
        return cls(inner, chat_template, bos_token, eos_token)

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Tokenizer:
        """Read a bundle's tokenizer, with its chat template. Raises `BundleError`."""
        manifest = bundle.manifest
        special = manifest.special_tokens
        bos, eos = special.get("bos_token"), special.get("eos_token")
        return cls.from_file(bundle.tokenizer, chat_template=manifest.chat_template, bos_token=bos, eos_token=eos)

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
            With code "bad_request" when the text holds lone surrogates.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("bad_request", f"the text is not valid Unicode: {error.reason}") from error
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_further(self, text: str) -> list[int]:
        """Return the tokens of a text that goes on from another: no special ones are added, and no space before it.

        Raises `RequestError` as `encode` does.
        """
        start = self.encode("\n", add_special_tokens=False)  # takes the space that many put before what they are given
        whole = self.encode("\n" + text, add_special_tokens=False)
        if whole[: len(start)] == start:
            return whole[len(start) :]
        return self.encode(text, add_special_tokens=False)  # a tokenizer that joins line breaks adds no space

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; special ones and ids outside the vocabulary have none."""
        return str(self._inner.decode(list(ids), skip_special_tokens=True))

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt of a conversation, up to where the assistant speaks.

        Raises
        ------
        RequestError
            With code "bad_request" when the model has no chat template, or the template refuses the messages;
            "internal" when the template itself is broken.
        """
        if self._chat_template is None:
            raise RequestError("bad_request", "this model has no chat template: send a prompt instead of messages")
        return self._chat.render(messages)

    @cached_property
    def _chat(self) -> ChatTemplate:
        return ChatTemplate(self._chat_template or "", self._special_tokens)
