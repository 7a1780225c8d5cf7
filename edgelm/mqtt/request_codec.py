"""Decodes and encodes requests, and reports why a payload is not a valid request.

Pure functions: no connection, no clock, no topic names. Owns the JSON keys of requests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from edgelm.errors import RequestError
from edgelm.mqtt.packets import PROTOCOL, Properties, write_json
from edgelm.types import MAX_SESSION_LENGTH, RANGES, Constraint, SamplingParams, is_session_name
from edgelm.validation import FieldError, Length, Range, check_table

MAX_ID_LENGTH: Final = 128
MAX_CORRELATION_BYTES: Final = 1024
MAX_NESTING: Final = 256
"""Maximum nesting depth of lists and objects in a request."""
MAX_CHUNK_MS: Final = 10_000
DEFAULT_CHUNK_MS: Final = 50
MAX_TIMEOUT_S: Final = 86_400

SAMPLING_KEYS: Final = tuple(entry.name for entry in dataclasses.fields(SamplingParams))
_CONSTRAINT_KEYS: Final = ("json_schema", "regex", "choices")

_NonEmpty = Annotated[str, Length(1)]
_ABSENT: Any = None
"""Default of keys that may be left out; none of them may be null."""


@dataclass(frozen=True, slots=True)
class _TextPart:
    """A part of a message's content."""

    type: Literal["text"]
    text: str


@dataclass(frozen=True, slots=True)
class _Message:
    """The keys of a message. `content` may be null, or left out, if there are tool calls."""

    role: str
    content: str | Annotated[tuple[_TextPart, ...], Length(1)] | None = None
    name: str = _ABSENT
    tool_calls: tuple[Mapping[str, Any], ...] | None = None
    tool_call_id: str = _ABSENT
    reasoning_content: str = _ABSENT


@dataclass(frozen=True, slots=True)
class _Body(SamplingParams):
    """The keys of a request with their types and ranges; never instantiated. All may be left out."""

    seed: Annotated[int, Range(*RANGES["seed"])] = _ABSENT
    v: Literal[1] = _ABSENT
    id: Annotated[str, Length(1, MAX_ID_LENGTH)] = _ABSENT
    prompt: _NonEmpty = _ABSENT
    messages: tuple[_Message, ...] = _ABSENT
    model: str = _ABSENT
    json_schema: Mapping[str, Any] = _ABSENT
    regex: str = _ABSENT
    choices: tuple[_NonEmpty, ...] = _ABSENT
    stream: bool = _ABSENT
    chunk_ms: Annotated[int, Range(0, MAX_CHUNK_MS)] = _ABSENT
    timeout_s: Annotated[float, Range(0, MAX_TIMEOUT_S, open_low=True)] = _ABSENT
    response_topic: str = _ABSENT
    session: Annotated[str, Length(1, MAX_SESSION_LENGTH)] = _ABSENT
    end_session: bool = _ABSENT
    system: str = _ABSENT
    raw: bool = _ABSENT
    tools: tuple[Mapping[str, Any], ...] = _ABSENT
    template_vars: Mapping[str, Any] = _ABSENT
    priority: Literal[0] = _ABSENT


KNOWN_KEYS: Final = frozenset(entry.name for entry in dataclasses.fields(_Body))


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A decoded request. `sampling` holds only the values that the client gave; the bundle has the defaults.

    A request with neither prompt nor messages only ends its session.
    """

    id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    model: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    stream: bool = False
    chunk_ms: int = DEFAULT_CHUNK_MS
    timeout_s: float | None = None
    session: str | None = None
    end_session: bool = False
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_vars: Mapping[str, Any] | None = None
    system: str | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Envelope:
    """A partly decoded request: what is needed to reject it, and the JSON body."""

    id: str
    correlation: bytes | None
    response_topic: str | None
    body: Mapping[str, Any]
    problem: RequestError | None = None
    """The error that made `body` empty."""


def envelope_from_properties(properties: Properties, new_id: str) -> Envelope:
    """Return an envelope from a message's properties, without its payload. `new_id` is the id if they have none."""
    correlation = properties.correlation
    if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
        problem = RequestError(
            "too_large",
            f"correlation data: has {len(correlation)} bytes; at most {MAX_CORRELATION_BYTES} are allowed",
        )
        return Envelope(_id_from_correlation(correlation), None, properties.response_topic, {}, problem)
    request_id = _id_from_correlation(correlation) if correlation else new_id
    return Envelope(request_id, correlation, properties.response_topic, {})


def parse_envelope(payload: bytes, properties: Properties, new_id: str) -> Envelope:
    """Return the envelope of a message. Never raises: errors are stored in `problem`.

    A payload that does not begin with `{` is the prompt, without the line ends that `echo` appends.

    Parameters
    ----------
    payload
        Any bytes.
    properties
        Properties of the message.
    new_id
        The id if the message has none.
    """
    from_properties = envelope_from_properties(properties, new_id)
    if from_properties.problem is not None:
        return from_properties
    body: Mapping[str, Any] = {}
    problem = None
    try:
        body = _read_body(payload)
    except RequestError as error:
        problem = RequestError(error.code, error.message)  # a copy without traceback, whose frames hold the payload
    given = body.get("id")
    request_id = from_properties.id
    if not from_properties.correlation and isinstance(given, str) and _is_id(given):
        request_id = given
    reply = from_properties.response_topic
    if reply is None and isinstance(body.get("response_topic"), str):
        reply = body["response_topic"]
    return Envelope(request_id, from_properties.correlation, reply, body, problem)


def parse_request(envelope: Envelope) -> GenerateRequest:
    """Return the request in an envelope. Raises `RequestError`; its message names the key."""
    if envelope.problem is not None:
        raise envelope.problem
    body = envelope.body
    constraints = [key for key in _CONSTRAINT_KEYS if key in body]
    if constraints:  # an empty one is the same as none
        body = {key: value for key, value in body.items() if key not in constraints or value not in ("", [])}
    try:
        check_table(_Body, body)
    except FieldError as error:
        raise RequestError("bad_request", str(error)) from None
    if "id" in body and not _is_id(body["id"]):
        raise _bad_request("id", f"must be 1 to {MAX_ID_LENGTH} printable characters")
    if "session" in body and not is_session_name(body["session"]):
        raise _bad_request("session", f"must be 1 to {MAX_SESSION_LENGTH} printable characters")
    ends = body.get("end_session", False)
    if ends and "session" not in body:
        raise _bad_request("end_session", "needs a session")
    prompt, messages = body.get("prompt"), tuple(body.get("messages", ())) or None
    if (prompt is None) == (messages is None) and (prompt is not None or not ends):
        raise _bad_request("prompt", "give either prompt or messages")
    for number, message in enumerate(messages or ()):
        if message.get("content") is None and not message.get("tool_calls"):
            raise _bad_request(f"messages[{number}].content", "is needed without tool_calls")
    if not all(name.isidentifier() for name in body.get("template_vars", ())):
        raise _bad_request("template_vars", "must be an object of variable names and values")
    sampling = {key: body[key] for key in SAMPLING_KEYS if key in body}
    if "stop" in sampling:
        sampling["stop"] = tuple(sampling["stop"])
    timeout_s = body.get("timeout_s")
    return GenerateRequest(
        id=envelope.id,
        prompt=prompt,
        messages=messages,
        model=body.get("model"),
        sampling=sampling,
        constraint=_read_constraint(body),
        stream=body.get("stream", False),
        chunk_ms=body.get("chunk_ms", DEFAULT_CHUNK_MS),
        timeout_s=None if timeout_s is None else float(timeout_s),
        session=body.get("session"),
        end_session=ends,
        tools=tuple(body.get("tools", ())) or None,
        template_vars=body.get("template_vars") or None,
        system=body.get("system"),
        raw=body.get("raw", False),
    )


def write_request(
    request: GenerateRequest, response_topic: str | None, *, with_properties: bool
) -> tuple[bytes, Properties]:
    """Return the payload and properties of a request.

    Without properties (MQTT 3.1.1) the payload holds the id and the response topic.
    """
    given: dict[str, Any] = {
        "prompt": request.prompt,
        "messages": None if request.messages is None else [dict(message) for message in request.messages],
        "model": request.model,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in request.sampling.items()},
        "stream": request.stream,
        "chunk_ms": request.chunk_ms,
        "timeout_s": request.timeout_s,
        "system": request.system,
        "raw": request.raw or None,
        "tools": None if request.tools is None else list(request.tools),
        "template_vars": None if request.template_vars is None else dict(request.template_vars),
    }
    if request.constraint is not None:
        value = request.constraint.value
        schema = request.constraint.kind == "json_schema"
        given[request.constraint.kind] = json.loads(str(value)) if schema else value
    if request.session is not None:
        given |= {"session": request.session, "end_session": request.end_session}
    body = {"v": PROTOCOL, **{key: value for key, value in given.items() if value is not None}}
    if with_properties:
        return write_json(body), Properties(
            response_topic=response_topic,
            correlation=request.id.encode(),
            expiry_s=None if request.timeout_s is None else max(1, math.ceil(request.timeout_s)),
            content_type="application/json",
            is_text=True,
        )
    body["id"] = request.id
    if response_topic is not None:
        body["response_topic"] = response_topic
    return write_json(body), Properties()


def _read_body(payload: bytes) -> Mapping[str, Any]:
    try:
        text = payload.decode("utf-8-sig")  # some editors and clients write a byte order mark
    except UnicodeDecodeError as error:
        raise RequestError("bad_request", f"payload: is not UTF-8 (byte {error.start})") from error
    if not text.lstrip(" \t\r\n").startswith("{"):
        return {"prompt": text.rstrip("\r\n")}
    body: Any = _decode_fast(text)
    if body is None:
        body = _decode(text)
    if text.count("[") + text.count("{") > MAX_NESTING and _count_levels(body) > MAX_NESTING:
        raise RequestError("bad_request", _TOO_DEEP)
    return body  # type: ignore[no-any-return]


def _decode_fast(text: str) -> Any:
    """Return the JSON value of a text; None if msgspec refuses it, whose messages say less than `_decode`'s."""
    import msgspec

    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None


def _decode(text: str) -> Any:
    """Return the JSON value of a text. Raises `RequestError` for what strict JSON in UTF-8 does not allow."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            "bad_request",
            f"payload: begins with {{ but is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            f' (send a prompt that begins with {{ as {{"prompt": "{{..."}})',
        ) from None
    except ValueError:  # a number with more digits than Python reads
        raise RequestError("bad_request", "payload: contains a number that is too long") from None
    except RecursionError:
        raise RequestError("bad_request", _TOO_DEEP) from None
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RequestError("bad_request", "payload: contains an unpaired surrogate") from None
    except ValueError:
        raise RequestError("bad_request", "payload: contains NaN or a number that is too large") from None
    except RecursionError:
        raise RequestError("bad_request", _TOO_DEEP) from None
    return body


_TOO_DEEP: Final = f"payload: is nested too deeply; at most {MAX_NESTING} levels"


def _count_levels(value: Any) -> int:
    """Return the nesting depth of lists and objects in a value, at most `MAX_NESTING` + 1."""
    level: list[Any] = [value]
    for depth in range(MAX_NESTING + 1):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += [item for item in each.values() if isinstance(item, (dict, list))]
            elif isinstance(each, list):
                inner += [item for item in each if isinstance(item, (dict, list))]
        if not inner:
            return depth + 1
        level = inner
    return MAX_NESTING + 1


def _id_from_correlation(data: bytes) -> str:
    """Return correlation data as an id: as text if printable, otherwise in hexadecimal or as a hash if too long."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if _is_id(text):
        return text
    return data.hex() if 2 * len(data) <= MAX_ID_LENGTH else hashlib.sha256(data).hexdigest()


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH and value.isprintable()


def _bad_request(key: str, what: str) -> RequestError:
    return RequestError("bad_request", f"{key}: {what}")


def _read_constraint(body: Mapping[str, Any]) -> Constraint | None:
    given = [key for key in _CONSTRAINT_KEYS if key in body]
    if not given:
        return None
    if len(given) > 1:
        raise _bad_request(given[1], f"cannot be combined with {given[0]}")
    value = body[given[0]]
    if given[0] == "choices":
        return Constraint("choices", tuple(value))
    if given[0] == "regex":
        return Constraint("regex", value)
    return Constraint("json_schema", json.dumps(value, ensure_ascii=False))
