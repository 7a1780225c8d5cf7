"""Model architectures: how the configuration and tensor names of each one map onto the decoder.

One module for each architecture. A module with an `ARCHITECTURE` is found by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from edgelm.errors import CheckpointError

from .common import Architecture


@cache
def load_architectures() -> dict[str, Architecture]:
    """Return every family by its `model_type`."""
    modules = (import_module(f"{__name__}.{entry.name}") for entry in iter_modules(__path__))
    found = (module.ARCHITECTURE for module in modules if hasattr(module, "ARCHITECTURE"))
    return {family.model_type: family for family in found}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the family of a config.json. Raises `CheckpointError` naming the model type and the supported ones."""
    model_type = config.get("model_type")
    known = load_architectures()
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(
            f"architecture {model_type!r} has no builder here; supported: {', '.join(sorted(known))}."
            " Others can be tried with --via optimum"
        )
    return known[model_type]
