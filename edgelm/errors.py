"""The errors that edgelm raises on purpose: one root class, a few subclasses with data as attributes.

Knows nothing of how an error is presented: the command line prints one line, the MQTT service sends a JSON object.
"""

from __future__ import annotations

from typing import Final

MAX_MESSAGE_LENGTH: Final = 4000
"""Maximum length of an error's text, in characters."""


class EdgelmError(Exception):
    """Root of every error that edgelm raises on purpose. `str()` gives one line of limited length.

    The message may quote an untrusted file, with line breaks and of any length.
    """

    def __str__(self) -> str:
        text = " ".join(super().__str__().splitlines())
        return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]}..."


class BundleError(EdgelmError):
    """A bundle cannot be opened: it is missing, not a bundle, damaged, or of a newer schema."""


class CheckpointError(EdgelmError):
    """A checkpoint cannot be exported: a file, tensor, shape or architecture is invalid or unsupported."""


class UsageError(EdgelmError):
    """A command was called with options that cannot be combined; exit code 2."""


class ConfigError(EdgelmError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(EdgelmError):
    """A data file cannot be read, or one of its lines is invalid."""


class TemplateLimitError(EdgelmError):
    """A chat template exceeds its limit of time or output."""


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
"""Status, as in HTTP, of every code with which a request can be refused or can fail."""


class RequestError(EdgelmError):
    """A request was refused or failed.

    Parameters
    ----------
    code
        A key of `STATUS_OF_CODE`.
    message
        What is wrong, what is allowed, what to do next.
    retry_after_s
        Seconds after which to try again; None if trying again does not help.
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
