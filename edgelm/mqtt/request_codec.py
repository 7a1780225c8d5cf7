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
from typing import Any, Final

from edgelm.errors import RequestError
from edgelm.mqtt.packets import PROTOCOL, Properties, write_json
from edgelm.types import MAX_SESSION_LENGTH, Constraint, SamplingParams, is_session_name

MAX_ID_LENGTH: Final = 128
MAX_CORRELATION_BYTES: Final = 1024
MAX_NESTING: Final = 256
"""Maximum nesting depth of lists and objects in a request."""
MAX_CHUNK_MS: Final = 10_000
MAX_TIMEOUT_S: Final = 86_400

SAMPLING_KEYS: Final = tuple(entry.name for entry in dataclasses.fields(SamplingParams))
_CONSTRAINT_KEYS: Final = ("json_schema", "regex", "choices")
_OTHER_KEYS: Final = ("v", "id", "prompt", "messages", "model", "stream", "chunk_ms", "timeout_s", "response_topic")
_SESSION_KEYS: Final = ("session", "end_session")
_TEMPLATE_KEYS: Final = ("system", "raw", "tools", "template_vars")
_MESSAGE_KEYS: Final = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
_UNSUPPORTED_KEYS: Final = {
    "priority": "not supported; leave it out or send 0",
}
KNOWN_KEYS: Final = frozenset(
    (*SAMPLING_KEYS, *_CONSTRAINT_KEYS, *_OTHER_KEYS, *_SESSION_KEYS, *_TEMPLATE_KEYS, *_UNSUPPORTED_KEYS)
)


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
    for key in body:
        if key not in KNOWN_KEYS:
            raise _bad_request(_quote(key), f"unknown key; known are {', '.join(sorted(KNOWN_KEYS))}")
    for key, why in _UNSUPPORTED_KEYS.items():
        if key in body and not (key == "priority" and body[key] == 0 and _is_int(body[key])):
            raise _bad_request(key, why)
    if "v" in body and (body["v"] != PROTOCOL or not _is_int(body["v"])):
        raise _bad_request("v", f"must be {PROTOCOL}, the version of the protocol")
    if "id" in body and not _is_id(body["id"]):
        raise _bad_request("id", f"must be 1 to {MAX_ID_LENGTH} printable characters")
    _read_text(body, "response_topic")
    if "session" in body and not is_session_name(body["session"]):
        raise _bad_request("session", f"must be 1 to {MAX_SESSION_LENGTH} printable characters")
    ends = _read_bool(body, "end_session")
    if ends and "session" not in body:
        raise _bad_request("end_session", "needs a session")
    prompt, messages = _read_text(body, "prompt"), _read_messages(body)
    if (prompt is None) == (messages is None) and (prompt is not None or not ends):
        raise _bad_request("prompt", "give either prompt or messages")
    if prompt == "":
        raise _bad_request("prompt", "must not be empty")
    return GenerateRequest(
        id=envelope.id,
        prompt=prompt,
        messages=messages,
        model=_read_text(body, "model"),
        sampling=_read_sampling(body),
        constraint=_read_constraint(body),
        stream=_read_bool(body, "stream"),
        chunk_ms=_read_chunk_ms(body),
        timeout_s=_read_timeout_s(body),
        session=body.get("session"),
        end_session=ends,
        tools=_read_tools(body),
        template_vars=_read_template_vars(body),
        system=_read_text(body, "system"),
        raw=_read_bool(body, "raw"),
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
    if text.count("[") + text.count("{") > MAX_NESTING and _count_levels(body) > MAX_NESTING:
        raise RequestError("bad_request", _TOO_DEEP)
    try:
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise RequestError("bad_request", "payload: contains an unpaired surrogate") from None
    except ValueError:
        raise RequestError("bad_request", "payload: contains NaN or a number that is too large") from None
    return body  # type: ignore[no-any-return]


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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad_request(key: str, what: str) -> RequestError:
    return RequestError("bad_request", f"{key}: {what}")


def _quote(key: str) -> str:
    return repr(key if len(key) <= 64 else key[:61] + "...")


def _read_text(body: Mapping[str, Any], key: str) -> str | None:
    if key in body and not isinstance(body[key], str):
        raise _bad_request(key, "must be text")
    return body.get(key)


def _read_bool(body: Mapping[str, Any], key: str) -> bool:
    if not isinstance(body.get(key, False), bool):
        raise _bad_request(key, "must be true or false")
    return bool(body.get(key, False))


def _read_strings(body: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = body[key]
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise _bad_request(key, "must be a list of non-empty strings")
    return tuple(value)


def _read_messages(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    value = body.get("messages", [])
    if not isinstance(value, list):
        raise _bad_request("messages", "must be a list")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _bad_request("messages", 'each must be {"role": text, "content": text}')
        for key in message:
            if key not in _MESSAGE_KEYS:
                raise _bad_request(
                    "messages", f"unknown key {_quote(key)} in a message; known are {', '.join(_MESSAGE_KEYS)}"
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
        have_keys = all(isinstance(part, dict) and set(part) == {"type", "text"} for part in content)
        if not have_keys or not all(part["type"] == "text" and isinstance(part["text"], str) for part in content):
            raise _bad_request("messages", 'each part of a content must be {"type": "text", "text": text}')
    elif not isinstance(content, str) and not (content is None and calls):
        raise _bad_request("messages", 'each must be {"role": text, "content": text}')


def _read_tools(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...] | None:
    value = body.get("tools", [])
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _bad_request("tools", "must be a list of objects, each with the name and parameters of a function")
    return tuple(value) or None


def _read_template_vars(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value = body.get("template_vars", {})
    if not isinstance(value, dict) or not all(name.isidentifier() for name in value):
        raise _bad_request("template_vars", "must be an object of variable names and values")
    return value or None


def _read_sampling(body: Mapping[str, Any]) -> Mapping[str, Any]:
    given = {key: body[key] for key in SAMPLING_KEYS if key in body}
    if "stop" in given:
        given["stop"] = _read_strings(body, "stop")
    if "seed" in given and given["seed"] is None:
        raise _bad_request("seed", "must be an integer")
    SamplingParams(**given)  # checks types and ranges
    return given


def _read_constraint(body: Mapping[str, Any]) -> Constraint | None:
    given = [key for key in _CONSTRAINT_KEYS if key in body and body[key] not in ("", [])]
    if not given:
        return None
    if len(given) > 1:
        raise _bad_request(given[1], f"cannot be combined with {given[0]}")
    kind = given[0]
    if kind == "choices":
        return Constraint("choices", _read_strings(body, "choices"))
    if kind == "regex":
        return Constraint("regex", str(_read_text(body, "regex")))
    if not isinstance(body["json_schema"], dict):
        raise _bad_request("json_schema", "must be an object")
    return Constraint("json_schema", json.dumps(body["json_schema"], ensure_ascii=False))


def _read_chunk_ms(body: Mapping[str, Any]) -> int:
    value = body.get("chunk_ms", GenerateRequest.__dataclass_fields__["chunk_ms"].default)
    if not _is_int(value) or not 0 <= value <= MAX_CHUNK_MS:
        raise _bad_request("chunk_ms", f"must be a whole number in [0, {MAX_CHUNK_MS}]")
    return int(value)


def _read_timeout_s(body: Mapping[str, Any]) -> float | None:
    if "timeout_s" not in body:
        return None
    value = body["timeout_s"]
    if not (_is_int(value) or isinstance(value, float)) or not 0 < value <= MAX_TIMEOUT_S:
        raise _bad_request("timeout_s", f"must be a number of seconds in (0, {MAX_TIMEOUT_S}]")
    return float(value)
