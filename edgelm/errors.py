"""What can go wrong, as types: one root, a few children, data as attributes.

Knows nothing of how an error is shown: the command line prints one line, the MQTT service a JSON object.
"""

from __future__ import annotations

from typing import Final

MAX_MESSAGE_LENGTH: Final = 4000
"""Characters of an error's text."""


class EdgelmError(Exception):
    """Root of every error that edgelm raises on purpose. Its text is one line for a person.

    It often quotes a stranger's file, which may have lines and no end.
    """

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())
        return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]}..."


class BundleError(EdgelmError):
    """A bundle cannot be opened: missing, foreign, damaged, or of a newer schema."""


class CheckpointError(EdgelmError):
    """A checkpoint cannot be exported: a file, tensor, shape or architecture is not what it should be."""


class UsageError(EdgelmError):
    """A command was called with options that do not go together; exit code 2."""


class ConfigError(EdgelmError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(EdgelmError):
    """A data file cannot be read, or one of its lines is not what it should be."""


class TemplateLimitError(EdgelmError):
    """A chat template takes longer, or makes more, than one may."""


class DeviceError(EdgelmError):
    """A board, profile or emulator is unknown or cannot be used."""


class MissingExtraError(EdgelmError):
    """A feature needs an optional extra that is not installed."""

    def __init__(self, feature: str, extra: str, module: str, command: str) -> None:
        super().__init__(f"{feature} needs the module {module!r}, which is not installed: {command}")
        self.extra = extra
        self.module = module


STATUS_OF_CODE: Final[dict[str, int]] = {
    "bad_request": 400,
    "forbidden": 403,
    "model_not_found": 404,
    "deadline": 408,
    "id_conflict": 409,
    "too_large": 413,
    "rate_limited": 429,
    "cancelled": 499,
    "internal": 500,
    "interrupted": 500,
    "busy": 503,
    "draining": 503,
}
"""Every code a request can be refused or ended with, and its HTTP-like status."""


class RequestError(EdgelmError):
    """A request cannot be served. `code` is a key of `STATUS_OF_CODE`.

    Parameters
    ----------
    code
        A key of `STATUS_OF_CODE`.
    message
        What was wrong, what was allowed, what to do next.
    retry_after_s
        When trying again makes sense, in seconds; None where it does not.
    """

    def __init__(self, code: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = STATUS_OF_CODE[code]
        self.retry_after_s = retry_after_s

    def to_dict(self) -> dict[str, object]:
        """Return the error as the JSON object of the MQTT protocol."""
        return {"code": self.code, "message": self.message, "retry_after_s": self.retry_after_s}
