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
    """Return every architecture by its `model_type`."""
    modules = (import_module(f"{__name__}.{entry.name}") for entry in iter_modules(__path__))
    found = (module.ARCHITECTURE for module in modules if hasattr(module, "ARCHITECTURE"))
    return {architecture.model_type: architecture for architecture in found}


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a config.json. Raises `CheckpointError` with the supported ones."""
    model_type = config.get("model_type")
    known = load_architectures()
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(
            f"architecture {model_type!r} is not supported; supported: {', '.join(sorted(known))}."
            " Others can be tried with --via optimum"
        )
    return known[model_type]
