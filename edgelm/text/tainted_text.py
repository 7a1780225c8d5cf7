"""Taint tracking: distinguishes a special token that a template writes from the same text in a message.

A message that contains the text of a special token, such as `<|im_end|>`, must stay text. Before the template is
rendered, a mark is put before one character of each such text. The marks are removed from the rendered prompt, and no
special token is recognized at their positions. Texts without special tokens get no marks.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Final, SupportsIndex

NONCHARACTERS: Final = range(0xFDD0, 0xFDF0)
"""Code points that Unicode reserves for internal use of a program: the marks."""
PRIVATE_USE_AREA: Final = range(0xF0000, 0x10FFFE)
"""Marks for texts that contain every noncharacter."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A rendered conversation. Characters at `tainted_positions` (ascending) belong to no special token."""

    text: str
    tainted_positions: tuple[int, ...] = ()

    def suffix_from(self, start: int) -> RenderedPrompt:
        """Return the prompt from position `start` on."""
        return RenderedPrompt(self.text[start:], tuple(p - start for p in self.tainted_positions if p >= start))

    def with_prefix(self, text: str) -> RenderedPrompt:
        """Return the prompt with `text` before it."""
        return RenderedPrompt(text + self.text, tuple(p + len(text) for p in self.tainted_positions))

    def is_tainted(self, start: int, end: int) -> bool:
        """Whether a tainted position lies in [start, end)."""
        i = bisect_left(self.tainted_positions, start)
        return i < len(self.tainted_positions) and self.tainted_positions[i] < end


class SpecialTokenFinder:
    """Finds special tokens in a text by their texts; no token is empty."""

    def __init__(self, tokens: Collection[str]) -> None:
        self.tokens = frozenset(tokens)
        self._lengths = sorted({len(token) for token in tokens}, reverse=True)
        self._first = {token[0] for token in tokens}
        self._last = {token[-1] for token in tokens}
        characters = "".join(map(re.escape, sorted(self._first)))
        self._starts = re.compile(f"[{characters}]") if characters else None

    def at(self, text: str, start: int) -> str | None:
        """Return the longest token that begins at a position."""
        return next((t for n in self._lengths if (t := text[start : start + n]) in self.tokens), None)

    def find(self, text: str, start: int = 0) -> Iterator[tuple[int, str]]:
        """Yield each position >= `start` where a token begins, with the longest such token; tokens may overlap."""
        if self._starts is not None:
            for found in self._starts.finditer(text, start):
                token = self.at(text, found.start())
                if token is not None:
                    yield found.start(), token

    def find_taint_positions(self, text: str, *, ends: bool) -> list[int]:
        """Return one position in each special token; with `ends` also in a partial token at either end of the text.

        A partial token is a token's prefix at the end of the text or a token's suffix at its start, without outer white
        space: the text that a template writes next to it may complete the token.
        """
        found = {start + len(token) - len(token.lstrip()) for start, token in self.find(text)}
        first, last = len(text) - len(text.lstrip()), len(text.rstrip())
        if ends and first < last and self._lengths:
            longest = self._lengths[0]
            tails = (p for p in range(max(first, last - longest + 1), last) if text[p] in self._first)
            heads = (p for p in range(first, min(last, first + longest - 1)) if text[p] in self._last)
            if any(self._any_token(str.startswith, text[p:last]) for p in tails):
                found.add(last - 1)
            if any(self._any_token(str.endswith, text[first : p + 1]) for p in heads):
                found.add(first)
        return sorted(found)

    def _any_token(self, matches: Callable[[str, str], bool], part: str) -> bool:
        return any(matches(token, part) for token in self.tokens)


class TaintTracker:
    """Marks the texts in a template's input, and reads the marks from its output."""

    def __init__(self, finder: SpecialTokenFinder, values: Any) -> None:
        self._finder = finder
        used = set(chain.from_iterable(_texts(values)))
        self.taint_mark = next(c for c in map(chr, chain(NONCHARACTERS, PRIVATE_USE_AREA)) if c not in used)

    def taint(self, value: Any, *, ends: bool = True) -> Any:
        """Return JSON values with marks in their texts; values that need no marks are returned unchanged."""
        if isinstance(value, str):
            positions = self._finder.find_taint_positions(value, ends=ends)
            if not positions:
                return value
            bounds = [0, *positions, len(value)]
            return TaintedText(self.taint_mark.join(value[a:b] for a, b in pairwise(bounds)), self.taint_mark)
        if isinstance(value, Mapping):
            return {self.taint(name, ends=ends): self.taint(each, ends=ends) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.taint(each, ends=ends) for each in value]
        return value

    def untaint(self, rendered: str) -> RenderedPrompt:
        """Return a rendered text without marks, with their positions."""
        if self.taint_mark not in rendered:
            return RenderedPrompt(rendered)
        parts = rendered.split(self.taint_mark)
        text = "".join(parts)
        positions, length = [], 0
        for part in parts[:-1]:
            length += len(part)
            positions.append(length)
        return RenderedPrompt(text, tuple(p for p in dict.fromkeys(positions) if p < len(text)))


class TaintedText(str):
    """A text with marks that behaves like the text without marks in comparisons, searches and slices.

    Slices and concatenations keep the marks.
    """

    __slots__ = ("_taint_mark",)
    _taint_mark: str

    def __new__(cls, value: str, taint_mark: str) -> TaintedText:
        """Create from `value`, which contains each mark before the character that it marks."""
        self = super().__new__(cls, value)
        self._taint_mark = taint_mark
        return self

    @property
    def plain_text(self) -> str:
        """The text without marks."""
        return str.replace(self, self._taint_mark, "")

    def _rewrap(self, value: str) -> str:
        return TaintedText(value, self._taint_mark) if self._taint_mark in value else value

    def _slice(self, start: int, end: int) -> str:
        """Return the characters [start, end) of the plain text with their marks."""
        return self._slices([(start, end)])[0]

    def _slices(self, ranges: Iterable[tuple[int, int]]) -> list[str]:
        """Return the characters of several ranges; the marks are located once for all of them."""
        raw, offsets = super().__str__(), self._raw_offsets()
        return [self._rewrap(raw[offsets[start] : offsets[max(start, end)]]) for start, end in ranges]

    def _raw_offsets(self) -> list[int]:
        """Return the offset in the raw text of each plain character with its mark, and of the end."""
        raw = super().__str__()
        is_mark = [c == self._taint_mark for c in raw]
        starts = [i - (i > 0 and is_mark[i - 1]) for i in range(len(raw)) if not is_mark[i]]
        return [*starts, len(raw)]

    def __str__(self) -> str:
        return self

    def __repr__(self) -> str:
        escaped_mark = ascii(self._taint_mark)[1:-1]
        return str.__repr__(self).replace(escaped_mark, self._taint_mark)  # a template may write a whole list

    def __eq__(self, other: object) -> bool:
        return self.plain_text == (other.plain_text if isinstance(other, TaintedText) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.plain_text)

    def __len__(self) -> int:
        return len(self.plain_text)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and _plain_text_of(key) in self.plain_text

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices((i, i + 1) for i in range(len(self))))

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        whole = range(len(self))
        if isinstance(key, slice):
            picked = whole[key]
            if picked.step == 1:
                return self._slice(picked.start, picked.stop)
            return self._rewrap("".join(map(str.__str__, self._slices((i, i + 1) for i in picked))))
        at = whole[key]
        return self._slice(at, at + 1)

    def __add__(self, other: str) -> str:
        return self._rewrap(str.__add__(self, other))

    def __radd__(self, other: str) -> str:
        return self._rewrap(str.__add__(other, self))

    def strip(self, chars: str | None = None, /) -> str:
        """See `str.strip`."""
        start = len(self) - len(self.plain_text.lstrip(chars))
        return self._slice(start, len(self.plain_text.rstrip(chars)))

    def lstrip(self, chars: str | None = None, /) -> str:
        """See `str.lstrip`."""
        return self._slice(len(self) - len(self.plain_text.lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        """See `str.rstrip`."""
        return self._slice(0, len(self.plain_text.rstrip(chars)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """See `str.split`."""
        return self._pieces(self.plain_text.split(None if sep is None else _plain_text_of(sep), maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """See `str.rsplit`."""
        return self._pieces(self.plain_text.rsplit(None if sep is None else _plain_text_of(sep), maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        """See `str.splitlines`."""
        lines, at, ranges = self.plain_text.splitlines(keepends=True), 0, []
        for line, kept in zip(lines, self.plain_text.splitlines(keepends), strict=True):
            ranges.append((at, at + len(kept)))
            at += len(line)
        return self._slices(ranges)

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """See `str.partition`."""
        before, between, _ = self.plain_text.partition(_plain_text_of(sep))
        end = len(before) + len(between)
        return self._slice(0, len(before)), self._slice(len(before), end), self._slice(end, len(self))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """See `str.rpartition`."""
        before, between, _ = self.plain_text.rpartition(_plain_text_of(sep))
        end = len(before) + len(between)
        return self._slice(0, len(before)), self._slice(len(before), end), self._slice(end, len(self))

    def removeprefix(self, prefix: str, /) -> str:
        """See `str.removeprefix`."""
        return self._slice(len(self) - len(self.plain_text.removeprefix(_plain_text_of(prefix))), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        """See `str.removesuffix`."""
        return self._slice(0, len(self.plain_text.removesuffix(_plain_text_of(suffix))))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        """See `str.replace`."""
        plain_old = _plain_text_of(old)
        if not plain_old:
            return self._rewrap(str.replace(self, plain_old, new, count))
        pieces = self.split(plain_old, count)
        return self._rewrap(str.__str__(new).join(str.__str__(piece) for piece in pieces))

    def _pieces(self, pieces: list[str], sep: str | None) -> list[str]:
        """Return pieces of the plain text that a separator or white space separated, with their marks."""
        text, ranges, at = self.plain_text, [], 0
        for i, piece in enumerate(pieces):
            if sep is None:
                at = text.index(piece, at)
            elif i:
                at += len(_plain_text_of(sep))
            ranges.append((at, at + len(piece)))
            at += len(piece)
        return self._slices(ranges)


def _plain_text_of(value: str) -> str:
    return value.plain_text if isinstance(value, TaintedText) else value


def _search_method(name: str) -> Any:
    """Return a method that searches the plain text."""
    search = getattr(str, name)

    def method(self: TaintedText, part: Any, *bounds: Any) -> Any:
        plain_part = tuple(map(_plain_text_of, part)) if isinstance(part, tuple) else _plain_text_of(part)
        return search(self.plain_text, plain_part, *bounds)

    method.__name__ = name
    method.__doc__ = f"See `str.{name}`."
    return method


def _case_method(name: str) -> Any:
    """Return a method that changes the case of characters and keeps the marks."""
    change = getattr(str, name)

    def method(self: TaintedText, *arguments: Any) -> str:
        return self._rewrap(change(self, *arguments))

    method.__name__ = name
    method.__doc__ = f"See `str.{name}`."
    return method


for _name in ("startswith", "endswith", "find", "rfind", "index", "rindex", "count"):
    setattr(TaintedText, _name, _search_method(_name))
for _name in ("lower", "upper", "casefold", "swapcase"):
    setattr(TaintedText, _name, _case_method(_name))


def _texts(value: Any) -> Iterable[str]:
    """Yield every text in JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from chain(_texts(name), _texts(each))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)
