"""Models that `edgelm pull` knows by name: their source, licence, use and recommended precisions.

The data is catalogue.toml beside this file. Its sizes are computed from the models' shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edgelm.errors import EdgelmError
from edgelm.system.files import read_toml
from edgelm.validation import read

CATALOGUE_FILE: Final = Path(__file__).with_name("catalogue.toml")

MODEL_NAME_PATTERN: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Allowed names of models in the catalogue and of a user's bundles (full match)."""

USABLE_MEMORY_SHARE: Final = 0.7
"""Share of a board's memory that a model may use; the rest is for the system and other programs."""


@dataclass(frozen=True, slots=True)
class ModelVariant:
    """A precision of a model, with the disk space and memory that it needs."""

    quant: str
    mb: int
    """Weights on disk, 10^6 bytes."""
    memory_mb: int
    """Memory with one request of 2,048 tokens, 10^6 bytes."""
    fast: bool = False
    """Whether the export skips calibration, which takes too long on a board for models of this size."""


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model of the catalogue; `variants` are in the order of preference."""

    name: str
    hub: str
    licence: str
    parameters: int
    good_at: str
    variants: tuple[ModelVariant, ...]
    revision: str | None = None
    """The commit to fetch; None is the newest."""
    gated: bool = False
    """Whether the hub requires an account that has accepted the licence."""

    def choose_variant(self, memory_mb: float | None, quant: str | None = None) -> ModelVariant | None:
        """Return the first variant that fits a board's memory (10^6 bytes; None is unknown), or None.

        With `quant` only that precision is considered.
        """
        usable_mb = math.inf if memory_mb is None else USABLE_MEMORY_SHARE * memory_mb
        offered = (variant for variant in self.variants if quant in (None, variant.quant))
        return next((variant for variant in offered if variant.memory_mb <= usable_mb), None)

    @property
    def smallest_board_gb(self) -> int:
        """Memory of the smallest board that a variant fits: 1, 2, 4, 8 ... GB (2^30 bytes)."""
        needed_mb = min(variant.memory_mb for variant in self.variants) / USABLE_MEMORY_SHARE
        return next(size for size in (1, 2, 4, 8, 16, 32, 64, 128) if needed_mb <= size * 2**30 / 1e6)


def load_catalogue() -> Mapping[str, CatalogueModel]:
    """Return the models by name, smallest first."""
    entries = read_toml(CATALOGUE_FILE)
    models = [read(CatalogueModel, {**entry, "name": name}, name) for name, entry in entries.items()]
    return {model.name: model for model in sorted(models, key=lambda model: model.parameters)}


def check_name(name: str) -> None:
    """Raise `EdgelmError` unless `name` is allowed for a bundle."""
    if not MODEL_NAME_PATTERN.fullmatch(name):
        raise EdgelmError(
            f"{name!r:.80} is not a valid model name: use 1 to 64 of a-z 0-9 . _ -, a letter or digit first"
        )
