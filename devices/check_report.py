"""What the smoke test reports: checks, each one line for a person and values for a program."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .detect import DetectedBoard


@dataclass(frozen=True, slots=True)
class SmokeCheck:
    """One line of the report; `told` is for a person, `values` for a program."""

    name: str
    status: Literal["ok", "failed", "skipped", "info"]
    told: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SmokeReport:
    """What the smoke test found. `tokens`: the greedy answer to the prompt."""

    board: DetectedBoard
    bundle: str
    quantization: str | None
    tokens: tuple[int, ...]
    checks: tuple[SmokeCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "ok": self.ok,
            "board": self.board.to_dict(),
            "bundle": self.bundle,
            "quantization": self.quantization,
            "tokens": list(self.tokens),
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }
