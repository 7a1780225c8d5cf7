"""Which bits, block size, method and accuracy level each matrix of a model gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from .spec import Spec

Quant = Literal["fp32", "int8", "int4", "mixed", "keep"]
BITS: Final[dict[Quant, int]] = {"fp32": 32, "int8": 8, "int4": 4, "mixed": 4, "keep": 8}
"""Bits a weight, scales not counted; of `mixed` those that a matrix has before any is upgraded, of `keep` those of one
that cannot be kept."""

BLOCK_SIZES: Final = (16, 32, 64, 128)
BLOCK_SIZE: Final = 32
"""4.5 bits a weight, as llama.cpp's Q4_0; larger blocks are smaller and faster and lose more, unless calibrated."""

MIXED_BITS: Final = 5.5
"""Bits a weight of `mixed` where nothing else is asked for, those of llama.cpp's Q5_0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How matrices are stored, by name: those in `exceptions` as said there, all others alike. None is float32."""

    default: Spec | None
    exceptions: Mapping[str, Spec | None] = field(default_factory=dict)

    def spec(self, name: str) -> Spec | None:
        """Return how a matrix is stored."""
        return self.exceptions.get(name, self.default)

    @property
    def is_calibrated(self) -> bool:
        """Whether any matrix needs to know what reaches it."""
        specs = [self.default, *self.exceptions.values()]
        return any(spec is not None and spec.method == "gptq" for spec in specs)
