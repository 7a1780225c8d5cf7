"""Streamed text equals the decoded text for any text, split of prompt and completion, stop strings and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import byte_fallback, byte_level, bytes_of, straddling

from edgelm.text.detokenizer import MAX_PENDING_TOKENS, PROMPT_TAIL_TOKENS
from edgelm.text.stop_strings import StopFilter
from edgelm.text.tokenizer import StreamDecoder, Tokenizer

REPLACEMENT = "\ufffd"
PIECES = st.sampled_from(
    ["Once upon", " a ", "  ", "\n", "é", "漢字", "日本語", "😀", "👨‍👩‍👧‍👦", "👍🏽", "한", "€", "", '{"']
)
TEXT = st.one_of(
    st.lists(PIECES, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
PLAIN = TEXT.map(lambda text: text.replace(REPLACEMENT, ""))


@pytest.fixture(scope="module", params=["byte level", "byte fallback", "stories260K"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "stories260K":
        checkpoint: Path = request.getfixturevalue("stories_checkpoint")
        return Tokenizer.from_file(checkpoint / "tokenizer.json")
    return byte_level() if request.param == "byte level" else byte_fallback()


def stream(decoder: StreamDecoder, tokens: Sequence[int]) -> list[str]:
    pieces = [decoder.push(token) for token in tokens] + [decoder.finish()]
    assert decoder.text == "".join(pieces)
    return pieces


def whole_characters(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """Return the text of tokens without an incomplete last character."""
    known = bytes_of(tokenizer)
    text = b"".join(known[token] for token in tokens).decode("utf-8", "ignore")
    return text.removeprefix(" ") if tokenizer.byte_tokens else text


@given(text=TEXT, special=st.booleans())
def test_decode_after_encode_is_the_text(tokenizer: Tokenizer, text: str, special: bool) -> None:
    text = text.replace("▁", "")  # SentencePiece's character for a space
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=special)) == text


@given(text=TEXT, special=st.booleans())
def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer, text: str, special: bool) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=special)
    pieces = stream(StreamDecoder(tokenizer), tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


@settings(max_examples=300)
@given(text=PLAIN, data=st.data())
def test_a_completion_continues_its_prompt(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    tokens = tokenizer.encode(text)
    cut = data.draw(st.integers(0, len(tokens)))
    whole = tokenizer.decode(tokens)
    before = whole_characters(tokenizer, tokens[:cut])
    pieces = stream(StreamDecoder(tokenizer, tokens[:cut]), tokens[cut:])
    assert "".join(pieces) == whole[len(before) :]
    assert REPLACEMENT not in "".join(pieces)


@given(text=PLAIN)
def test_text_is_returned_as_soon_as_it_is_final(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    decoder = StreamDecoder(tokenizer)
    for count, token in enumerate(tokens, 1):
        decoder.push(token)
        assert decoder.text == whole_characters(tokenizer, tokens[:count])


@settings(max_examples=300)
@given(data=st.data(), prefix=TEXT)
def test_any_tokens_give_the_text_of_their_bytes(tokenizer: Tokenizer, data: st.DataObject, prefix: str) -> None:
    """Also for broken UTF-8: one U+FFFD per maximal subpart of a character, as the Unicode standard requires."""
    known = bytes_of(tokenizer)
    some = st.sampled_from(sorted(known))
    few = st.sampled_from(data.draw(st.lists(some, min_size=1, max_size=3)))
    tail = tokenizer.encode(prefix + "x")  # ends between characters, and not in an empty text
    tokens = data.draw(st.lists(st.one_of(some, few), max_size=80))
    pieces = stream(StreamDecoder(tokenizer, tail), tokens)
    assert "".join(pieces) == b"".join(known[token] for token in tokens).decode("utf-8", "replace")


@given(prompt=PLAIN, answer=PLAIN, data=st.data())
def test_a_prompt_cut_inside_a_character_does_not_change_the_completion(
    tokenizer: Tokenizer, prompt: str, answer: str, data: st.DataObject
) -> None:
    tokens = tokenizer.encode("x" + prompt)
    tail = tokens[: data.draw(st.integers(min(2, len(tokens)), len(tokens)))]
    known = bytes_of(tokenizer)
    answered = tokenizer.encode(answer, add_special_tokens=False)
    pieces = stream(StreamDecoder(tokenizer, tail), answered)
    assert "".join(pieces) == b"".join(known[token] for token in answered).decode()


@given(text=TEXT, stop=st.lists(st.text("ab,漢😀 ", min_size=1, max_size=4), max_size=4), data=st.data())
def test_stop_strings_cut_the_text(tokenizer: Tokenizer, text: str, stop: list[str], data: st.DataObject) -> None:
    tokens = tokenizer.encode(text)
    whole = "".join(stream(StreamDecoder(tokenizer), tokens))
    if whole and data.draw(st.booleans()):  # a stop string that occurs
        start = data.draw(st.integers(0, len(whole) - 1))
        stop = [*stop, whole[start : start + data.draw(st.integers(1, 6))]]
    expected, is_stopped = cut_naively(whole, stop)
    decoder = StreamDecoder(tokenizer, (), tuple(stop))
    assert "".join(stream(decoder, tokens)) == expected
    assert decoder.is_stopped == is_stopped
    assert not is_stopped or decoder.push(tokens[0]) == ""


LETTERS = st.text("abc", max_size=30)


@settings(max_examples=300)
@given(st.lists(LETTERS, max_size=8), st.lists(st.text("abc", min_size=1, max_size=5), max_size=4))
def test_stop_filter_holds_back_no_more_than_it_must(chunks: list[str], stop: list[str]) -> None:
    filtered = StopFilter(tuple(stop))
    given_out = ""
    for count, chunk in enumerate(chunks, 1):
        given_out += filtered.push(chunk)
        text = "".join(chunks[:count])
        expected, is_stopped = cut_naively(text, stop)
        assert filtered.matched == is_stopped
        if not is_stopped:
            held = [n for n in range(len(text)) if any(s.startswith(text[n:]) for s in stop)]
            expected = text[: held[0]] if held else text
        assert given_out == expected
    assert given_out + filtered.flush() == cut_naively("".join(chunks), stop)[0]


def cut_naively(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Read letter by letter; cut before the longest stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


class Counting:
    """A tokenizer that counts what it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.byte_tokens = tokenizer.byte_tokens
        self.calls: list[int] = []

    def decode(self, ids: Sequence[int]) -> str:
        self.calls.append(len(ids))
        return self.tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["broken", "special", "text", "replacement"])
def test_the_cost_of_a_token_is_bounded(tokenizer: Tokenizer, kind: str) -> None:
    known = bytes_of(tokenizer)
    tokens = {
        "broken": [token for token, text in known.items() if text == b"\xf0"] * 2000,
        "special": [token for token, text in known.items() if not text] * 700,
        "text": tokenizer.encode("Once upon a time 漢字😀 " * 100),
        "replacement": tokenizer.encode(REPLACEMENT * 700, add_special_tokens=False),
    }[kind]
    assert len(tokens) >= 1000
    counting = Counting(tokenizer)
    decoder = StreamDecoder(counting, tokens[:PROMPT_TAIL_TOKENS])
    for token in tokens:
        counting.calls.clear()
        decoder.push(token)
        assert len(counting.calls) <= 4
        assert max(counting.calls) <= MAX_PENDING_TOKENS + PROMPT_TAIL_TOKENS
        assert len(decoder._context) <= MAX_PENDING_TOKENS
    assert kind == "special" or len(decoder.text) > 600


@pytest.mark.parametrize("character", ["é", "漢", "😀"])
def test_tokens_that_never_end_at_a_character(character: str) -> None:
    tokenizer, spelled, across = straddling(character)
    tokens = [*spelled[:-1], *[across] * 100, spelled[-1]]
    assert tokenizer.decode(tokens) == character * 101
    decoder = StreamDecoder(tokenizer)
    for count, token in enumerate(tokens[:-1]):
        decoder.push(token)
        assert decoder.text == character * max(0, count - len(spelled) + 2)
    assert "".join(stream(StreamDecoder(tokenizer), tokens)) == character * 101
