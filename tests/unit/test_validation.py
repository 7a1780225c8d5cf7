"""Untrusted values against the types of dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.validation import FieldError, Length, Pattern, Range, check, parse_text, read, show_value


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, Range(1, 10)]
    share: Annotated[float, Range(0.0, 1.0, open_low=True, open_high=True)] | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["a", "b"] = "a"
    names: Annotated[tuple[Annotated[str, Length(1, 3)], ...], Length(0, 2)] = ()
    table: Mapping[Annotated[str, Pattern(r"^[a-z]+\Z", "small letters")], Inner] = field(default_factory=dict)
    one_or_several: str | tuple[str, ...] = "x"
    anything: Any = None


def test_a_table_becomes_a_dataclass():
    table = {"inner": {"size": 3, "share": 0.5}, "names": ["a"], "table": {"k": {"size": 1}}, "one_or_several": ["p"]}
    expected = Outer(Inner(3, 0.5), names=("a",), table={"k": Inner(1)}, one_or_several=("p",))
    assert read(Outer, table) == expected
    check(expected.inner)


@pytest.mark.parametrize(
    ("table", "facts"),
    [
        ([], ["table", "list"]),
        ({}, ["inner", "missing"]),
        ({"inner": {"size": 0}}, ["inner.size", "[1, 10]", "got 0"]),
        ({"inner": {"size": True}}, ["inner.size", "True"]),
        ({"inner": {"size": 1.0}}, ["inner.size", "1.0"]),
        ({"inner": {"size": 10**5000}}, ["inner.size", "60 digits"]),
        ({"inner": {"size": 1, "share": 0}}, ["inner.share", "(0.0, 1.0)"]),
        ({"inner": {"size": 1, "share": math.nan}}, ["inner.share", "nan"]),
        ({"inner": {"size": 1, "sizes": 1, "a\nb": 1}}, ["inner.sizes", "did you mean size", r"'a\nb'"]),
        ({"inner": {"size": 1}, "kind": "c"}, ["kind", "a, b", "'c'"]),
        ({"inner": {"size": 1}, "names": ["a", "bcde"]}, ["names[1]", "1 to 3", "bcde", "4"]),
        ({"inner": {"size": 1}, "names": ["a"] * 3}, ["names", "0 to 2", "3"]),
        ({"inner": {"size": 1}, "table": {"K": {"size": 1}}}, ["table", "small letters", "'K'"]),
        ({"inner": {"size": 1}, "table": {"k": {"size": 11}}}, ["table['k'].size", "11"]),
        ({"inner": {"size": 1}, "one_or_several": [1]}, ["one_or_several[0]", "text", "1"]),
        ({"inner": {"size": 1}, "\ud800": 1}, [r"'\ud800'", "inner"]),
    ],
    ids=map(str, range(16)),
)
def test_an_error_names_key_value_and_range(table, facts):
    with pytest.raises(FieldError) as caught:
        read(Outer, table)
    message = str(caught.value)
    assert not [fact for fact in facts if fact not in message], message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("value", [Inner(0), Inner("1"), Inner(None), Inner(1, "x"), Inner(1, 1.0)], ids=repr)
def test_the_fields_of_an_instance_are_checked(value):
    with pytest.raises(FieldError, match=r"size|share"):
        check(value)


@dataclass(frozen=True)
class Unbounded:
    positive: Annotated[float, Range(0, math.inf, open_low=True, open_high=True)] = 1.0
    maybe_infinite: Annotated[float, Range(0, math.inf)] = math.inf


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, 10**400])
def test_an_open_end_may_be_infinite(value):
    check(Unbounded(1e308))
    with pytest.raises(FieldError, match=r"positive.*inf"):
        check(Unbounded(value))


def test_numbers_of_numpy_are_numbers():
    np = pytest.importorskip("numpy")
    check(Inner(1, np.float64(0.5)))
    with pytest.raises(FieldError, match="share"):
        check(Inner(1, np.float64(1.5)))


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "3", 3),
        (int, "x", "x"),
        (Annotated[float, Range(0, 1)] | None, "0.5", 0.5),
        (bool, "Yes", True),
        (bool, "maybe", "maybe"),
        (str | tuple[str, ...], "a", "a"),
        (str | tuple[str, ...], "a, b", ("a", "b")),
        (tuple[str, ...], "a", ("a",)),
        (Literal["text", "json"], "json", "json"),
    ],
    ids=str,
)
def test_text_of_the_environment(hint, text, value):
    assert parse_text(hint, text) == value


@given(
    st.recursive(st.none() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.tuples(inner))
)
def test_any_value_is_shown_on_a_short_line(value):
    shown = show_value(value)
    assert len(shown) <= 80
    assert "\n" not in shown
