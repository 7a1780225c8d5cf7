"""How one matrix is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Method = Literal["rtn", "clip", "hqq", "gptq"]
METHODS: Final[tuple[Method, ...]] = ("rtn", "clip", "hqq", "gptq")


@dataclass(frozen=True, slots=True)
class Spec:
    """How one matrix is stored."""

    bits: int
    block_size: int
    symmetric: bool = True
    method: Method = "clip"
    accuracy_level: int = 4
