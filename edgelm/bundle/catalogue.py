"""Models that `edgelm pull` knows by name: where they are, what they may be used for, the forms that are good here.

The catalogue is catalogue.toml beside this file. Its sizes are computed from the models' shapes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgelm.errors import EdgelmError

FILE: Final = Path(__file__).with_name("catalogue.toml")

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
    """A model of the catalogue; `forms` stand in the order of preference, the first that fits is taken."""

    name: str
    hub: str
    licence: str
    parameters: int
    good_at: str
    forms: tuple[ModelVariant, ...]
    revision: str | None = None
    """The commit that is fetched; None is the newest."""
    gated: bool = False
    """Whether the hub asks for an account that has accepted the licence."""

    def choose_variant(self, memory_mb: float | None, quant: str | None = None) -> ModelVariant | None:
        """Return the first form that a board of so much memory (10^6 bytes; None is not known) holds.

        With `quant` only that precision is looked at. None where nothing fits.
        """
        offered = [form for form in self.forms if quant in (None, form.quant)]
        return next(
            (form for form in offered if memory_mb is None or form.memory_mb <= USABLE_MEMORY_SHARE * memory_mb), None
        )

    @property
    def smallest_board_gb(self) -> int:
        """Memory of the smallest board that holds one of the forms: 1, 2, 4, 8 ... GB (2^30 bytes)."""
        least = min(form.memory_mb for form in self.forms) / USABLE_MEMORY_SHARE
        return next(size for size in (1, 2, 4, 8, 16, 32, 64, 128) if least <= size * 2**30 / 1e6)


def catalogue() -> Mapping[str, CatalogueModel]:
    """Return the models by name, the smallest first."""
    if sys.version_info >= (3, 11):  # read by few commands: not at import
        import tomllib
    else:
        import tomli as tomllib
    entries = tomllib.loads(FILE.read_text("utf-8"))
    models = (_known(name, entry) for name, entry in entries.items())
    return {model.name: model for model in sorted(models, key=lambda model: model.parameters)}


def _known(name: str, entry: Mapping[str, Any]) -> CatalogueModel:
    return CatalogueModel(**{**entry, "name": name, "forms": tuple(ModelVariant(**form) for form in entry["forms"])})


def check_name(name: str) -> None:
    """Raise `EdgelmError` unless a bundle may be called so."""
    if not MODEL_NAME_PATTERN.fullmatch(name):
        raise EdgelmError(f"{name!r:.80} is no name for a model: 1 to 64 of a-z 0-9 . _ -, a letter or digit first")
