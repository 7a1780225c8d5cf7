"""Checks untrusted values against the types of a dataclass. An error names the key, what is allowed, and the value.

A dataclass states the type and range of each field once: `layers: Annotated[int, Range(1, 1024)]`. msgspec decides
whether a value is accepted; this module translates the types for it and words the errors, because msgspec's messages
name neither the value nor the range. Supported are dataclasses, `tuple[X, ...]`, `Mapping[K, V]`, `Literal`, str, int,
float, bool, Any, and unions; unions with a Path are not checked. Knows neither JSON nor TOML. The first check imports
msgspec.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

FLAGS: Final = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
"""How an environment variable spells true and false, in any case."""

_WORDS: Final = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_MAX_SHOWN: Final = 80
"""Characters of a value in an error."""


class FieldError(ValueError):
    """A value is not allowed. The message names the key, what is allowed, and the value."""


@dataclass(frozen=True, slots=True)
class Range:
    """Allowed numbers. Both ends are included unless the range is open there."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


@dataclass(frozen=True, slots=True)
class Length:
    """Allowed number of characters or entries, both ends included; None is no upper end."""

    low: int
    high: int | None = None


@dataclass(frozen=True, slots=True)
class Pattern:
    """A regular expression that the text must match, and its meaning for a person."""

    regex: str
    meaning: str


def read(kind: type[T], table: object, path: str = "") -> T:
    """Return a dataclass made of a table, as JSON or TOML gives it. Numbers keep their type: an int stays an int.

    `path` names the table in errors. Raises `FieldError` for unknown, missing and invalid keys, and what the
    dataclasses raise.
    """
    check_table(kind, table, path)
    return _build(kind, table)  # type: ignore[no-any-return]


def check_table(kind: Any, table: object, path: str = "") -> None:
    """Raise `FieldError` unless `read` would accept the table."""
    if not _is_allowed(kind, table):
        raise FieldError(_find_fault(kind, table, path))


def check(instance: object) -> None:
    """Raise `FieldError` unless every field of a dataclass has a value that its type allows."""
    import msgspec

    kind: Any = type(instance)
    names, row = _row_type(kind)
    try:
        msgspec.convert([getattr(instance, name) for name in names], row)
    except (msgspec.ValidationError, OverflowError):
        for name, hint in field_types(kind).items():
            value = getattr(instance, name)
            plain = float(value) if isinstance(value, float) else value  # msgspec refuses subclasses, such as NumPy's
            if not _is_allowed(hint, plain):
                raise FieldError(_find_fault(hint, value, name)) from None


def parse_text(hint: Any, text: str) -> Any:
    """Return the text of an environment variable as a value for a field: number, flag, or list with commas.

    Text that fits none of the field's types is returned unchanged, for `check` to refuse.
    """
    kinds = [_bare(choice) for choice in _choices(hint)]
    if any(get_origin(kind) is tuple for kind in kinds) and ("," in text or str not in kinds):
        return tuple(item.strip() for item in text.split(","))
    for kind in kinds:
        with suppress(ValueError, KeyError):
            return FLAGS[text.lower()] if kind is bool else kind(text) if kind in (int, float) else text
    return text


@functools.cache
def field_types(kind: Any) -> Mapping[str, Any]:
    """Return the types of a dataclass's fields by name, ranges included."""
    return get_type_hints(kind, include_extras=True)


def field_ranges(kind: Any) -> Mapping[str, Range]:
    """Return the ranges of a dataclass's numbers by name."""
    limits = {name: getattr(_choices(hint)[0], "__metadata__", ()) for name, hint in field_types(kind).items()}
    return {name: limit for name, found in limits.items() for limit in found if isinstance(limit, Range)}


def suggest_match(word: str, known: Iterable[str], cutoff: float = 0.7, *, otherwise: str = "") -> str:
    """Return a suggestion to append to an error about an unknown word; `otherwise` if no known word is similar."""
    import difflib

    close = difflib.get_close_matches(word[:_MAX_SHOWN], list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else otherwise


def suggest_key(key: str, known: Iterable[str]) -> str:
    """Return what to append to an error about an unknown key: the most similar known key, or all of them."""
    return suggest_match(key, known, otherwise=f"; allowed are {', '.join(sorted(known))}")


def show_value(value: object) -> str:
    """Return a value for an error message, shortened. Python cannot format integers of more than 4,300 digits."""
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if value is None or isinstance(value, (str, int, float)):
        return f"{value!r:.{_MAX_SHOWN}}"
    return (
        "a table" if isinstance(value, dict) else "a list" if isinstance(value, (list, tuple)) else type(value).__name__
    )


def describe(hint: Any) -> str:
    """Return what a field of a type may hold, in words."""
    choices = _choices(hint)
    if len(choices) > 1:
        return " or ".join(map(describe, choices))
    if get_origin(choices[0]) is Annotated:
        inner = describe(_bare(choices[0]))
        return inner + "".join(_describe_limit(limit, inner) for limit in choices[0].__metadata__)
    if get_origin(choices[0]) is Literal:
        values = [str(value) for value in get_args(choices[0])]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    return _WORDS.get(choices[0]) or ("a list" if get_origin(choices[0]) is tuple else "a table")


def _describe_limit(limit: Range | Length | Pattern, what: str) -> str:
    if isinstance(limit, Range):
        return f" in {limit}"
    if isinstance(limit, Length):
        size = f"at least {limit.low}" if limit.high is None else f"{limit.low} to {limit.high}"
        return f" of {size} {'characters' if what == 'text' else 'entries'}"
    return f", {limit.meaning}"


# --- types for msgspec ---


@functools.cache
def _msgspec_type(hint: Any) -> Any:
    """Return a type for msgspec: dataclasses become structs that refuse unknown keys, limits become `msgspec.Meta`."""
    import msgspec

    origin, arguments = get_origin(hint), get_args(hint)
    if _is_dataclass(hint):
        types = {name: _msgspec_type(inner) for name, inner in field_types(hint).items()}
        required = _required(hint)
        fields: list[Any] = [(name, each) if name in required else (name, each, None) for name, each in types.items()]
        return msgspec.defstruct(hint.__name__, fields, forbid_unknown_fields=True, kw_only=True)
    if origin is Annotated:
        limited = _msgspec_type(arguments[0])
        for limit in hint.__metadata__:
            limited = Annotated[limited, _meta(limit)]
        return limited
    if origin is tuple:
        return tuple[_msgspec_type(arguments[0]), ...]  # type: ignore[misc]
    if origin is Mapping:
        return dict[_msgspec_type(arguments[0]), _msgspec_type(arguments[1])]  # type: ignore[misc]
    if origin in (Union, UnionType):
        if Path in arguments:  # msgspec takes only values of JSON
            return Any
        return Union[tuple(_msgspec_type(each) for each in arguments)]  # noqa: UP007
    return hint


def _meta(limit: Range | Length | Pattern) -> Any:
    from msgspec import Meta

    if isinstance(limit, Length):
        return Meta(min_length=limit.low, max_length=limit.high)
    if isinstance(limit, Pattern):
        return Meta(pattern=limit.regex)
    ends: dict[str, Any] = {"gt" if limit.open_low else "ge": limit.low}
    if math.isfinite(limit.high):
        ends["lt" if limit.open_high else "le"] = limit.high
    elif limit.open_high:  # msgspec takes only finite ends
        ends["le"] = sys.float_info.max
    return Meta(**ends)


@functools.cache
def _row_type(kind: Any) -> tuple[tuple[str, ...], Any]:
    """Return the names of a dataclass's fields, and a type for the list of their values."""
    import msgspec

    fields = [(name, _msgspec_type(hint)) for name, hint in field_types(kind).items()]
    return tuple(name for name, _ in fields), msgspec.defstruct(f"{kind.__name__}Row", fields, array_like=True)


def _is_allowed(hint: Any, value: object) -> bool:
    import msgspec

    try:
        msgspec.convert(value, _msgspec_type(hint))
    except (msgspec.ValidationError, OverflowError, UnicodeEncodeError):  # the last: a key with half a surrogate pair
        return False
    return True


# --- dataclasses and errors ---


def _build(hint: Any, value: Any) -> Any:
    """Return an accepted value with its tables as dataclasses and its lists as tuples."""
    bare = _matching(hint, value)
    if _is_dataclass(bare):
        types = field_types(bare)
        return bare(**{name: _build(types[name], part) for name, part in value.items()})
    if get_origin(bare) is Mapping:
        return {name: _build(get_args(bare)[1], part) for name, part in value.items()}
    if get_origin(bare) is tuple:
        return tuple(_build(get_args(bare)[0], part) for part in value)
    return value


def _find_fault(hint: Any, value: Any, path: str) -> str:
    """Return what is wrong with a refused value: its innermost part that is not allowed."""
    bare = _matching(hint, value)
    if _is_dataclass(bare):
        start, known = path and f"{path}.", field_types(bare)
        unknown = [str(name) for name in value if name not in known]
        if unknown:
            listed = ", ".join(f"{start}{name}" if name.isidentifier() else f"{name!r:.60}" for name in unknown[:5])
            return f"unknown key {listed}{suggest_key(unknown[0], known)}"
        missing = [name for name in _required(bare) if name not in value]
        if missing:
            return f"{', '.join(f'{start}{name}' for name in missing)} is missing"
    elif get_origin(bare) is Mapping:
        wrong = [name for name in value if not _is_allowed(get_args(bare)[0], name)]
        if wrong:
            return f"a name in {path} must be {describe(get_args(bare)[0])}, got {show_value(wrong[0])}"
    for inner, part, place in _parts(bare, value, path):
        if not _is_allowed(inner, part):
            return _find_fault(inner, part, place)
    allowed = describe(hint)
    size = f" of length {len(value)}" if " to " in allowed and isinstance(value, (str, list, tuple, dict)) else ""
    return f"{path or 'the value'} must be {allowed}, got {show_value(value)}{size}"


def _parts(bare: Any, value: Any, path: str) -> Iterator[tuple[Any, Any, str]]:
    """Yield type, value and path of each part of a table or list."""
    if _is_dataclass(bare):
        known = field_types(bare)
        yield from ((known[name], part, f"{path}.{name}".lstrip(".")) for name, part in value.items())
    elif get_origin(bare) is Mapping:
        yield from ((get_args(bare)[1], part, f"{path}[{name!r:.60}]") for name, part in value.items())
    elif get_origin(bare) is tuple:
        yield from ((get_args(bare)[0], part, f"{path}[{i}]") for i, part in enumerate(value))


def _matching(hint: Any, value: object) -> Any:
    """Return the type of a union that holds tables or lists like the value, without limits; None if none does."""
    for bare in map(_bare, _choices(hint)):
        is_table = _is_dataclass(bare) or get_origin(bare) is Mapping
        if (is_table and isinstance(value, dict)) or (get_origin(bare) is tuple and isinstance(value, (list, tuple))):
            return bare
    return None


@functools.cache
def _required(kind: Any) -> frozenset[str]:
    """Return the names of a dataclass's fields without a default."""
    fields = dataclasses.fields(kind)
    missing = dataclasses.MISSING
    return frozenset(each.name for each in fields if each.default is missing and each.default_factory is missing)


@functools.cache
def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union without None, or the one type."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(each for each in get_args(hint) if each is not NoneType)
    return (hint,)


def _is_dataclass(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint
