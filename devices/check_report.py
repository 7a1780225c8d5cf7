"""The report of the smoke test: checks, each with one line of text and with values for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .detect import DetectedBoard


@dataclass(frozen=True, slots=True)
class SmokeCheck:
    """One check: `message` is printed, `values` are for programs."""

    name: str
    status: Literal["ok", "failed", "skipped", "info"]
    message: str
    values: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the check as in `--json`, whose key of the message is "told"."""
        return {"name": self.name, "status": self.status, "told": self.message, "values": self.values}


@dataclass(frozen=True, slots=True)
class SmokeReport:
    """The result of the smoke test. `tokens`: the greedy answer to the prompt."""

    board: DetectedBoard
    bundle: str
    quantization: str | None
    tokens: tuple[int, ...]
    checks: tuple[SmokeCheck, ...]

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "ok": self.ok,
            "board": self.board.to_dict(),
            "bundle": self.bundle,
            "quantization": self.quantization,
            "tokens": list(self.tokens),
            "checks": [check.to_dict() for check in self.checks],
        }
