"""Checks that values read from a file have the types that a dataclass declares, recursively."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_type(value: object, hint: Any, name: str) -> None:
    """Raise TypeError with `name` unless `value` has the declared type `hint`, recursively."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        fits = isinstance(value, hint)
        for field_name, inner in _field_types(hint).items() if fits else ():
            check_type(getattr(value, field_name), inner, field_name)
    elif origin in (Union, UnionType):
        fits = True
        if value is not None:  # a union is always "X | None" here
            check_type(value, arguments[0], name)
    elif origin is tuple and isinstance(value, tuple):
        fits = True
        for item in value:
            check_type(item, arguments[0], f"an entry of {name}")
    elif origin is Mapping and isinstance(value, dict):
        fits = True
        for item in value.values():
            check_type(item, arguments[1], f"an entry of {name}")
    elif origin is Literal:
        fits = any(type(value) is type(allowed) and value == allowed for allowed in arguments)
    else:
        fits = hint is Any or type(value) is hint or (hint is float and type(value) is int)
    if not fits:
        raise TypeError(f"{name} cannot be {value!r:.80}")


@functools.cache
def _field_types(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields; cached because the lookup takes longer than the check."""
    return get_type_hints(kind)
