"""Bytes and properties <-> requests, and every reason why bytes are none.

Pure: no connection, no clock, no topic names. The keys of a request are spelled here only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from edgelm.errors import RequestError
from edgelm.mqtt.packets import PROTOCOL, Properties, write_json
from edgelm.types import MAX_SESSION_LENGTH, Constraint, SamplingParams, is_session_name

MAX_ID_LENGTH: Final = 128
MAX_CORRELATION_BYTES: Final = 1024
MAX_NESTING: Final = 256
"""Levels of lists and objects in a request."""
MAX_CHUNK_MS: Final = 10_000
MAX_TIMEOUT_S: Final = 86_400

SAMPLING_KEYS: Final = tuple(entry.name for entry in dataclasses.fields(SamplingParams))
_CONSTRAINT_KEYS: Final = ("json_schema", "regex", "choices")
_OTHER_KEYS: Final = ("v", "id", "prompt", "messages", "model", "stream", "chunk_ms", "timeout_s", "response_topic")
_SESSION_KEYS: Final = ("session", "end_session")
_TEMPLATE_KEYS: Final = ("system", "raw", "tools", "template_vars")
_MESSAGE_KEYS: Final = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_REFUSED_KEYS: Final = {
    "priority": "this board answers in the order of arrival; leave it out or send 0",
}
KNOWN_KEYS: Final = frozenset(
    (*SAMPLING_KEYS, *_CONSTRAINT_KEYS, *_OTHER_KEYS, *_SESSION_KEYS, *_TEMPLATE_KEYS, *_REFUSED_KEYS)
)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A request as it travels. `sampling` holds the values that the client gave; the bundle has the others.

    One with neither prompt nor messages only ends its session.
    """

    id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    model: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    constraint: Constraint | None = None
    stream: bool = False
    chunk_ms: int = 50
    timeout_s: float | None = None
    session: str | None = None
    end_session: bool = False
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_vars: Mapping[str, Any] | None = None
    system: str | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Envelope:
    """What must be known of a request before it is understood: enough to refuse it properly."""

    id: str
    correlation: bytes | None
    response_topic: str | None
    body: Mapping[str, Any]
    problem: RequestError | None = None
    """Why `body` is empty."""


def envelope_from_properties(properties: Properties, new_id: str) -> Envelope:
    """Return what a message's properties say alone, its payload unread; `new_id` is the id where they say none."""
    correlation = properties.correlation
    if correlation is not None and len(correlation) > MAX_CORRELATION_BYTES:
        problem = RequestError(
            "too_large",
            f"correlation data: has {len(correlation)} bytes, at most {MAX_CORRELATION_BYTES} come back with an answer",
        )
        return Envelope(_correlation_text(correlation), None, properties.response_topic, {}, problem)
    request_id = _correlation_text(correlation) if correlation else new_id
    return Envelope(request_id, correlation, properties.response_topic, {})


def parse_envelope(payload: bytes, properties: Properties, new_id: str) -> Envelope:
    """Return what a payload says of itself, never raising.

    A payload that does not begin with `{` is the prompt, without the line ends that a client's `echo` leaves behind it.

    Parameters
    ----------
    payload
        Any bytes.
    properties
        Those of the message.
    new_id
        The id where the message has none.
    """
    told = envelope_from_properties(properties, new_id)
    if told.problem is not None:
        return told
    body: Mapping[str, Any] = {}
    problem = None
    try:
        body = _read_body(payload)
    except RequestError as error:
        problem = RequestError(error.code, error.message)  # without the frames that hold the payload
    given = body.get("id")
    request_id = told.id
    if not told.correlation and isinstance(given, str) and _is_id(given):
        request_id = given
    reply = told.response_topic
    if reply is None and isinstance(body.get("response_topic"), str):
        reply = body["response_topic"]
    return Envelope(request_id, told.correlation, reply, body, problem)


def parse_request(envelope: Envelope) -> GenerateRequest:
    """Return the request in an envelope; raise `RequestError("bad_request")`, which names the key."""
    if envelope.problem is not None:
        raise envelope.problem
    body = envelope.body
    for key in body:
        if key not in KNOWN_KEYS:
            raise _bad_request(_shown(key), f"unknown key; known are {', '.join(sorted(KNOWN_KEYS))}")
    for key, why in _REFUSED_KEYS.items():
        if key in body and not (key == "priority" and body[key] == 0 and _is_whole(body[key])):
            raise _bad_request(key, why)
    if "v" in body and (body["v"] != PROTOCOL or not _is_whole(body["v"])):
        raise _bad_request("v", f"this board speaks version {PROTOCOL} of the protocol")
    if "id" in body and not _is_id(body["id"]):
        raise _bad_request("id", f"must be 1 to {MAX_ID_LENGTH} printable characters")
    _text(body, "response_topic")
    if "session" in body and not is_session_name(body["session"]):
        raise _bad_request("session", f"must be 1 to {MAX_SESSION_LENGTH} printable characters")
    ends = _flag(body, "end_session")
    if ends and "session" not in body:
        raise _bad_request("end_session", "needs the name of the session")
    prompt, messages = _text(body, "prompt"), _messages(body)
    if (prompt is None) == (messages is None) and (prompt is not None or not ends):
        raise _bad_request("prompt", "give either prompt or messages")
    if prompt == "":
        raise _bad_request("prompt", "is empty")
    return GenerateRequest(
        id=envelope.id,
        prompt=prompt,
        messages=messages,
        model=_text(body, "model"),
        sampling=_sampling(body),
        constraint=_constraint(body),
        stream=_flag(body, "stream"),
        chunk_ms=_chunk_ms(body),
        timeout_s=_timeout_s(body),
        session=body.get("session"),
        end_session=ends,
        tools=_tools(body),
        template_vars=_template_vars(body),
        system=_text(body, "system"),
        raw=_flag(body, "raw"),
    )


def write_request(
    request: GenerateRequest, response_topic: str | None, *, with_properties: bool
) -> tuple[bytes, Properties]:
    """Return a request's payload and properties; over 3.1.1 the payload carries what properties would."""
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
        text = payload.decode("utf-8-sig")  # some editors and clients begin a text with a byte order mark
    except UnicodeDecodeError as error:
        raise RequestError("bad_request", f"payload: is not UTF-8 (byte {error.start})") from error
    if not text.lstrip(" \t\r\n").startswith("{"):
        return {"prompt": text.rstrip("\r\n")}
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            "bad_request",
            f"payload: begins with {{ and is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
            f' (a prompt that begins with {{ is sent as {{"prompt": "{{..."}})',
        ) from None
    except ValueError:  # a number with more digits than Python reads
        raise RequestError("bad_request", "payload: holds a number that is too long") from None
    except RecursionError:
        raise RequestError("bad_request", _TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_NESTING and _nesting(body) > MAX_NESTING:
        raise RequestError("bad_request", _TOO_DEEP)
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RequestError("bad_request", "payload: holds half of a surrogate pair") from None
    except ValueError:
        raise RequestError("bad_request", "payload: holds a number that JSON does not have") from None
    return body  # type: ignore[no-any-return]


_TOO_DEEP: Final = f"payload: is nested too deeply; at most {MAX_NESTING} levels"


def _nesting(value: Any) -> int:
    """Return how many levels of lists and objects a value has, at most `MAX_NESTING` + 1."""
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


def _correlation_text(data: bytes) -> str:
    """Return correlation data as an id: as it is where it can be read, else in hexadecimal."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if _is_id(text):
        return text
    return data.hex() if 2 * len(data) <= MAX_ID_LENGTH else hashlib.sha256(data).hexdigest()


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID_LENGTH and value.isprintable()


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad_request(key: str, what: str) -> RequestError:
    return RequestError("bad_request", f"{key}: {what}")


def _shown(key: str) -> str:
    return repr(key if len(key) <= 64 else key[:61] + "...")


def _text(body: Mapping[str, Any], key: str) -> str | None:
    if key in body and not isinstance(body[key], str):
        raise _bad_request(key, "must be text")
    return body.get(key)


def _flag(body: Mapping[str, Any], key: str) -> bool:
    if not isinstance(body.get(key, False), bool):
        raise _bad_request(key, "must be true or false")
    return bool(body.get(key, False))


def _strings(body: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = body[key]
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _bad_request(key, "must be a list of non-empty strings")
    return tuple(value)


def _messages(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    value = body.get("messages", [])
    if not isinstance(value, list):
        raise _bad_request("messages", "must be a list")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad_request("messages", 'each must be {"role": text, "content": text}')
        for key in message:
            if key not in _MESSAGE_KEYS:
                raise _bad_request(
                    "messages", f"unknown key {_shown(key)} in one; known are {', '.join(_MESSAGE_KEYS)}"
                )
        _check_content(message)
    return tuple(value) or None


def _check_content(message: Mapping[str, Any]) -> None:
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
        raise _bad_request("messages", "tool_calls must be a list of objects")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            raise _bad_request("messages", f"{key} must be text")
    if isinstance(content, list) and content:
        whole = all(isinstance(part, dict) and set(part) == {"type", "text"} for part in content)
        if not whole or not all(part["type"] == "text" and isinstance(part["text"], str) for part in content):
            raise _bad_request("messages", 'each part of a content must be {"type": "text", "text": text}')
    elif not isinstance(content, str) and not (content is None and calls):
        raise _bad_request("messages", 'each must be {"role": text, "content": text}')


def _tools(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    value = body.get("tools", [])
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _bad_request("tools", "must be a list of objects, each a function with a name and parameters")
    return tuple(value) or None


def _template_vars(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value = body.get("template_vars", {})
    if not isinstance(value, dict) or not all(name.isidentifier() for name in value):
        raise _bad_request("template_vars", "must be an object of names of variables and their values")
    return value or None


def _sampling(body: Mapping[str, Any]) -> Mapping[str, Any]:
    given = {key: body[key] for key in SAMPLING_KEYS if key in body}
    if "stop" in given:
        given["stop"] = _strings(body, "stop")
    if "seed" in given and given["seed"] is None:
        raise _bad_request("seed", "must be an integer")
    SamplingParams(**given)  # checks types and ranges
    return given


def _constraint(body: Mapping[str, Any]) -> Constraint | None:
    given = [key for key in _CONSTRAINT_KEYS if key in body and body[key] not in ("", [])]
    if not given:
        return None
    if len(given) > 1:
        raise _bad_request(given[1], f"cannot be combined with {given[0]}")
    kind = given[0]
    if kind == "choices":
        return Constraint("choices", _strings(body, "choices"))
    if kind == "regex":
        return Constraint("regex", str(_text(body, "regex")))
    if not isinstance(body["json_schema"], dict):
        raise _bad_request("json_schema", "must be an object")
    return Constraint("json_schema", json.dumps(body["json_schema"], ensure_ascii=False))


def _chunk_ms(body: Mapping[str, Any]) -> int:
    value = body.get("chunk_ms", GenerateRequest.__dataclass_fields__["chunk_ms"].default)
    if not _is_whole(value) or not 0 <= value <= MAX_CHUNK_MS:
        raise _bad_request("chunk_ms", f"must be a whole number in [0, {MAX_CHUNK_MS}]")
    return int(value)


def _timeout_s(body: Mapping[str, Any]) -> float | None:
    if "timeout_s" not in body:
        return None
    value = body["timeout_s"]
    if not (_is_whole(value) or isinstance(value, float)) or not 0 < value <= MAX_TIMEOUT_S:
        raise _bad_request("timeout_s", f"must be a number of seconds in (0, {MAX_TIMEOUT_S}]")
    return float(value)
