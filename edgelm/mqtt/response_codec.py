"""Bytes and properties <-> answers: a chunk, a final, and what every message shares.

Pure: no connection, no clock, no topic names. The keys of an answer are spelled here, a request's in `asks`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from edgelm.errors import STATUS_OF_CODE, EdgelmError, RequestError
from edgelm.mqtt.packets import Properties, write_json
from edgelm.types import Completion, Timing, TokenLogprob, Usage

_ENDED_EARLY: Final = {
    "cancelled": "cancelled on request; text is what there was until then",
    "deadline": "the deadline passed; text is what there was until then",
}


class InvalidResponseError(EdgelmError):
    """Bytes that should be an answer are none."""


@dataclass(frozen=True, slots=True)
class ResponseChunk:
    """A piece of an answer. Those with 0 <= seq < the final's seq, joined in order, are its text."""

    id: str
    seq: int
    delta: str


@dataclass(frozen=True, slots=True)
class FinalMessage:
    """The end of an answer, with the whole text."""

    completion: Completion
    seq: int
    board: str
    model: str
    boot_id: str
    attempt: int = 1

    @property
    def error(self) -> RequestError | None:
        """Why the answer is not a whole one; None after "stop" and "length"."""
        reason = self.completion.finish_reason
        if self.completion.error is None and reason in _ENDED_EARLY:
            return RequestError(reason, _ENDED_EARLY[reason])
        return self.completion.error


def write_chunk(delta: ResponseChunk) -> bytes:
    """Return a chunk's payload."""
    return write_json({"id": delta.id, "seq": delta.seq, "delta": delta.delta, "done": False})


def write_final_message(outcome: FinalMessage) -> bytes:
    """Return a final's payload."""
    error = outcome.error
    body = {"id": outcome.completion.id, "seq": outcome.seq, "done": True, **outcome.completion.to_dict()}
    body |= {"board": outcome.board, "model": outcome.model, "boot_id": outcome.boot_id, "attempt": outcome.attempt}
    body["error"] = None if error is None else error.to_dict()
    try:
        return write_json(body)
    except (ValueError, RecursionError):  # the model wrote JSON that Python reads but JSON does not have: 1e999
        return write_json({**body, "json": None, "logprobs": None})


def make_response_properties(correlation: bytes | None, left_s: float, error: RequestError | None = None) -> Properties:
    """Return the properties of an answer that is of use for `left_s` more seconds."""
    return Properties(
        correlation=correlation,
        expiry_s=max(1, math.ceil(left_s)),
        content_type="application/json",
        is_text=True,
        user=(("status", str(200 if error is None else error.status)),),
    )


def parse_response(payload: bytes) -> ResponseChunk | FinalMessage:
    """Return a chunk or a final message; unknown keys are ignored.

    Raises `InvalidResponseError` for anything else.
    """
    try:
        body = json.loads(payload)
        if not body["done"]:
            return ResponseChunk(str(body["id"]), int(body["seq"]), str(body["delta"]))
        told, reason = body["error"], body["finish_reason"]
        error = None
        if told is not None and reason not in _ENDED_EARLY:
            code = told["code"] if told["code"] in STATUS_OF_CODE else "internal"
            error = RequestError(code, str(told["message"]), retry_after_s=_pass_time_s(told.get("retry_after_s")))
        logprobs = body.get("logprobs")
        completion = Completion(
            id=str(body["id"]),
            text=str(body["text"]),
            tokens=tuple(body.get("tokens", ())),
            finish_reason=reason,
            usage=Usage(**_known(Usage, body["usage"])),
            timing=Timing(**_known(Timing, body["timing"])),
            logprobs=None if logprobs is None else tuple(_logprob(entry) for entry in logprobs),
            error=error,
            turn=body.get("turn"),
        )
        names = {name: str(body[name]) for name in ("board", "model", "boot_id")}
        return FinalMessage(completion, int(body["seq"]), attempt=int(body["attempt"]), **names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidResponseError(f"not an answer: {type(error).__name__}: {error}") from error


def _pass_time_s(value: Any) -> float | None:
    """Return a time to wait. Raises `TypeError` for what is none."""
    if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0):
        raise TypeError(f"retry_after_s is {value!r:.40}")
    return value


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((other["token"], other["logprob"]) for other in entry.get("top", ()))
    return TokenLogprob(entry["token"], entry["logprob"], top)
