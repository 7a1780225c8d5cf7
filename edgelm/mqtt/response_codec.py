"""Encodes and decodes responses: chunks and final messages.

Pure functions: no connection, no clock, no topic names. Owns the JSON keys of responses; `request_codec` owns those of
requests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from edgelm.errors import STATUS_OF_CODE, EdgelmError, RequestError
from edgelm.mqtt.packets import Properties, write_json
from edgelm.types import Completion, Timing, TokenLogprob, Usage
from edgelm.validation import field_types, read

_ENDED_EARLY: Final = {
    "cancelled": "cancelled on request; the text is incomplete",
    "deadline": "the deadline passed; the text is incomplete",
}


class InvalidResponseError(EdgelmError):
    """The payload is not a valid response."""


@dataclass(frozen=True, slots=True)
class ResponseChunk:
    """A piece of a response. The chunks with 0 <= seq < the final message's seq, joined in order, are its text."""

    id: str
    seq: int
    delta: str


@dataclass(frozen=True, slots=True)
class FinalMessage:
    """The last message of a response, with the whole text."""

    completion: Completion
    seq: int
    board: str
    model: str
    boot_id: str
    attempt: int = 1

    @property
    def error(self) -> RequestError | None:
        """Why the response is not complete; None for "stop", "length" and "repetition"."""
        reason = self.completion.finish_reason
        if self.completion.error is None and reason in _ENDED_EARLY:
            return RequestError(reason, _ENDED_EARLY[reason])
        return self.completion.error


def write_chunk(chunk: ResponseChunk) -> bytes:
    """Return the payload of a chunk."""
    return write_json({"id": chunk.id, "seq": chunk.seq, "delta": chunk.delta, "done": False})


def write_final_message(final: FinalMessage) -> bytes:
    """Return the payload of a final message."""
    error = final.error
    body = {"id": final.completion.id, "seq": final.seq, "done": True, **final.completion.to_dict()}
    body |= {"board": final.board, "model": final.model, "boot_id": final.boot_id, "attempt": final.attempt}
    body["error"] = None if error is None else error.to_dict()
    try:
        return write_json(body)
    except (ValueError, RecursionError):  # the text has a number that Python parses as infinity, such as 1e999
        return write_json({**body, "json": None, "logprobs": None})


def make_response_properties(correlation: bytes | None, left_s: float, error: RequestError | None = None) -> Properties:
    """Return the properties of a response that expires in `left_s` seconds, at least 1."""
    return Properties(
        correlation=correlation,
        expiry_s=max(1, math.ceil(left_s)),
        content_type="application/json",
        is_text=True,
        user=(("status", str(200 if error is None else error.status)),),
    )


def parse_response(payload: bytes) -> ResponseChunk | FinalMessage:
    """Decode a chunk or a final message; unknown keys are ignored.

    Raises `InvalidResponseError` if the payload is neither.
    """
    try:
        body = json.loads(payload)
        if not body["done"]:
            return ResponseChunk(str(body["id"]), int(body["seq"]), str(body["delta"]))
        given_error, reason = body["error"], body["finish_reason"]
        error = None
        if given_error is not None and reason not in _ENDED_EARLY:
            code = given_error["code"] if given_error["code"] in STATUS_OF_CODE else "internal"
            error = RequestError(
                code, str(given_error["message"]), retry_after_s=_check_retry_after(given_error.get("retry_after_s"))
            )
        logprobs = body.get("logprobs")
        completion = Completion(
            id=str(body["id"]),
            text=str(body["text"]),
            tokens=tuple(body.get("tokens", ())),
            finish_reason=reason,
            usage=_read_known(Usage, body["usage"]),
            timing=_read_known(Timing, body["timing"]),
            logprobs=None if logprobs is None else tuple(_parse_logprob(entry) for entry in logprobs),
            error=error,
            turn=body.get("turn"),
        )
        names = {name: str(body[name]) for name in ("board", "model", "boot_id")}
        return FinalMessage(completion, int(body["seq"]), attempt=int(body["attempt"]), **names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidResponseError(f"not a valid response: {type(error).__name__}: {error}") from error


def _check_retry_after(value: Any) -> float | None:
    """Return `value` if it is None or a non-negative number; raise `TypeError` otherwise."""
    if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0):
        raise TypeError(f"retry_after_s is {value!r:.40}")
    return value


def _read_known(kind: Any, values: Mapping[str, Any]) -> Any:
    """Return a dataclass made of those values that it knows: a newer board may send more."""
    return read(kind, {name: value for name, value in values.items() if name in field_types(kind)})


def _parse_logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((other["token"], other["logprob"]) for other in entry.get("top", ()))
    return TokenLogprob(entry["token"], entry["logprob"], top)
