"""The quantization methods, one module each: the module's name is the method's name, its `METHOD` defines it.

To add a method, add a module. `edgelm export --method`, the options and the plan find it here. The first line of the
module's docstring is the help text of `edgelm export`, which reads it without importing the module.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from ..method import Method
from ..spec import KEEP


@cache
def method_names() -> tuple[str, ...]:
    """Return the names of all methods in alphabetical order. Imports none of them."""
    return tuple(sorted(entry.name for entry in iter_modules(__path__)))


@cache
def load_method(name: str) -> Method:
    """Return the method with this name, one of `method_names`."""
    method: Method = import_module(f"{__name__}.{name}").METHOD
    return method


def needs_calibration(name: str) -> bool:
    """Return whether a matrix with this `QuantSpec.method` needs calibration text."""
    return name != KEEP and load_method(name).needs_moments
