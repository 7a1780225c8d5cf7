"""Models that `edgelm pull` knows by name: where they are, what they may be used for, the variants that are good here.

The catalogue is catalogue.toml beside this file. Its sizes are computed from the models' shapes.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgelm.errors import EdgelmError

CATALOGUE_FILE: Final = Path(__file__).with_name("catalogue.toml")

MODEL_NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""What a model may be called, in the catalogue and among a user's bundles: a whole match."""

USABLE_MEMORY_SHARE: Final = 0.7
"""Share of a board's memory that a model may take: the rest is the system's and other programs'."""


@dataclass(frozen=True, slots=True)
class ModelVariant:
    """A precision in which a model is exported, and what that takes."""

    quant: str
    mb: int
    """Weights on disk, 10^6 bytes."""
    memory_mb: int
    """What it takes with one request of 2,048 tokens, 10^6 bytes."""
    fast: bool = False
    """Whether it is exported without calibration, which takes too long for models of this size on a board."""


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model of the catalogue; `variants` stand in the order of preference, the first that fits is taken."""

    name: str
    hub: str
    licence: str
    parameters: int
    good_at: str
    variants: tuple[ModelVariant, ...]
    revision: str | None = None
    """The commit that is fetched; None is the newest."""
    gated: bool = False
    """Whether the hub asks for an account that has accepted the licence."""

    def choose_variant(self, memory_mb: float | None, quant: str | None = None) -> ModelVariant | None:
        """Return the first variant that a board of so much memory (10^6 bytes; None is not known) holds.

        With `quant` only that precision is looked at. None where nothing fits.
        """
        usable_mb = math.inf if memory_mb is None else USABLE_MEMORY_SHARE * memory_mb
        offered = (variant for variant in self.variants if quant in (None, variant.quant))
        return next((variant for variant in offered if variant.memory_mb <= usable_mb), None)

    @property
    def smallest_board_gb(self) -> int:
        """Memory of the smallest board that holds one of the variants: 1, 2, 4, 8 ... GB (2^30 bytes)."""
        least = min(variant.memory_mb for variant in self.variants) / USABLE_MEMORY_SHARE
        return next(size for size in (1, 2, 4, 8, 16, 32, 64, 128) if least <= size * 2**30 / 1e6)


def load_catalogue() -> Mapping[str, CatalogueModel]:
    """Return the models by name, the smallest first."""
    if sys.version_info >= (3, 11):  # read by few commands: not at import
        import tomllib
    else:
        import tomli as tomllib
    entries = tomllib.loads(CATALOGUE_FILE.read_text("utf-8"))
    models = (_parse_entry(name, entry) for name, entry in entries.items())
    return {model.name: model for model in sorted(models, key=lambda model: model.parameters)}


def _parse_entry(name: str, entry: Mapping[str, Any]) -> CatalogueModel:
    variants = tuple(ModelVariant(**variant) for variant in entry["variants"])
    return CatalogueModel(**{**entry, "name": name, "variants": variants})


def check_name(name: str) -> None:
    """Raise `EdgelmError` unless a bundle may be called so."""
    if not MODEL_NAME_PATTERN.fullmatch(name):
        raise EdgelmError(f"{name!r:.80} is no name for a model: 1 to 64 of a-z 0-9 . _ -, a letter or digit first")
