"""The bound on bytes per token holds for every text; there is none if a step may drop text."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Inner
from tokenizers.models import BPE, WordPiece
from vocabularies import byte_fallback, byte_level

from edgelm.engine import admission
from edgelm.engine.sessions import SessionState
from edgelm.errors import RequestError
from edgelm.text.token_bytes import UNICODE_TO_BYTE, measure_token_size
from edgelm.text.tokenizer import Tokenizer
from edgelm.types import Request, SamplingParams


def bytewise(normalizer: Any = None, splitter: Any = None, letters: Any = UNICODE_TO_BYTE, **options: Any) -> Inner:
    vocab = {letter: i for i, letter in enumerate(sorted(letters))}
    vocab |= {"aa": len(vocab), "aaaa": len(vocab) + 1}
    vocab |= {"KK": len(vocab), "KKKK": len(vocab) + 1}
    merges = [("a", "a"), ("aa", "aa"), ("K", "K"), ("KK", "KK")]
    inner = Inner(BPE(vocab, merges, **options))
    if normalizer is not None:
        inner.normalizer = normalizer
    inner.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return inner


KNOWN = {
    "byte level": byte_level()._inner,
    "byte fallback": byte_fallback()._inner,
    "bytes": bytewise(),
    "NFC": bytewise(normalizers.NFC()),
    "without some bytes": bytewise(letters=set(UNICODE_TO_BYTE) - set("<xyz\u0120")),
    "split": bytewise(splitter=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])),
}


@pytest.mark.parametrize("name", sorted(KNOWN))
@given(text=st.one_of(st.text(max_size=60), st.sampled_from("a \u1100\u212a\u0301<").map(lambda letter: letter * 50)))
@example(text="a" * 64)
@example(text=" " * 64)
@example(text="\u1112\u1161\u11ab" * 9)
@example(text="\u212a" * 30)
def test_a_text_has_at_least_min_tokens(name: str, text: str) -> None:
    inner = KNOWN[name]
    known = measure_token_size(inner)
    assert known is not None
    assert len(inner.encode(text, add_special_tokens=False).ids) >= known.min_tokens(text)
    if name in {"bytes", "split"}:
        assert known.min_tokens(text) == -(-len(text.encode()) // 4)


def test_nfc_shrinks_no_letter_by_more_than_the_bound() -> None:
    """For letters that NFC replaces; the property above covers letters that it joins."""
    for code in (code for code in range(0x110000) if not 0xD800 <= code < 0xE000):
        letter = chr(code)
        for form in {letter, unicodedata.normalize("NFD", letter)}:
            assert len(form.encode()) <= 4 * len(unicodedata.normalize("NFC", form).encode())


@pytest.mark.parametrize(
    "inner",
    [
        bytewise(normalizers.Strip()),
        bytewise(normalizers.Sequence([normalizers.NFC(), normalizers.Replace("  ", " ")])),
        bytewise(normalizers.NFKC()),
        bytewise(splitter=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])),
        bytewise(splitter=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])),
        bytewise(normalizers.NFC(), letters=set(UNICODE_TO_BYTE) - {"x"}),
        bytewise(letters=set(UNICODE_TO_BYTE) - {"x"}, unk_token="a", fuse_unk=True),
        bytewise(splitter=pre_tokenizers.Metaspace(), unk_token="a", fuse_unk=True),
        Inner(WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")),
    ],
)
def test_there_is_no_bound_if_text_may_be_dropped(inner: Inner) -> None:
    assert measure_token_size(inner) is None


def test_there_is_no_bound_if_a_token_removes_spaces() -> None:
    inner = bytewise()
    inner.add_tokens([AddedToken("<s>", rstrip=True)])
    assert measure_token_size(inner) is None


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(bytewise())
    text = "a" * (admission.SHORT_TEXT_LENGTH // 4 * 4 + 4)
    min_tokens = len(text) // 4
    with pytest.raises(RequestError, match=f"{min_tokens} tokens") as caught:
        tokenizer.check_length(text, min_tokens)
    assert caught.value.code == "bad_request"
    tokenizer.check_length(text, min_tokens + 1)
    Tokenizer(bytewise(normalizers.Strip())).check_length(" " * 1_000_000, 10)
    conversation = SessionState()
    monkeypatch.setattr(tokenizer, "encode", lambda *_: 1 // 0)
    with pytest.raises(RequestError, match=str(min_tokens)):
        conversation.with_prompt(Request("1", SamplingParams(), prompt=text), tokenizer, 10)
    with pytest.raises(ZeroDivisionError):
        conversation.with_prompt(Request("1", SamplingParams(), prompt="short"), tokenizer, 10)
