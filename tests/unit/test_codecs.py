"""Decoding of requests and topics: the cases that the protocol decides."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edgelm.errors import RequestError
from edgelm.mqtt.packets import Properties
from edgelm.mqtt.request_codec import GenerateRequest, parse_envelope, parse_request, write_request
from edgelm.mqtt.response_codec import FinalMessage, InvalidResponseError, parse_response
from edgelm.mqtt.topics import BoardTopics, RequestTopic, validate_response_topic


def _decode(payload: bytes | dict[str, object], properties: Properties | None = None) -> GenerateRequest:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return parse_request(parse_envelope(data, properties or Properties(), "new"))


@pytest.mark.parametrize("payload", [b"play jazz", b" [1, 2]", b"17", b'"quoted"', "größer".encode()])
def test_a_payload_that_is_not_a_json_object_is_the_prompt(payload: bytes) -> None:
    assert _decode(payload).prompt == payload.decode()
    assert _decode(payload + b"\r\n\n").prompt == payload.decode(), "trailing line ends are removed"


@pytest.mark.parametrize(
    ("payload", "where"),
    [
        (b'{"prompt": "cut of', "line 1, column 12"),
        (b"{'prompt': 'a'}", "line 1, column 2"),
        (b'{"prompt": "a"} x', "line 1, column 17"),
        (b' {"prompt": "a",\n "stream": True}', "line 2, column 12"),
    ],
)
def test_invalid_json_is_rejected_with_line_and_column(payload: bytes, where: str) -> None:
    with pytest.raises(RequestError, match=where):
        _decode(payload)


def test_a_prompt_in_json_is_not_changed() -> None:
    request = _decode({"prompt": " a\n", "raw": True})
    assert (request.prompt, request.raw) == (" a\n", True)
    assert _decode({"prompt": "a", "system": "Be brief."}).system == "Be brief."


@pytest.mark.parametrize(
    ("payload", "names"),
    [
        (b"\xff\xfe", "UTF-8"),
        (b"", "prompt"),
        (b"{}", "prompt"),
        (b'{"prompt": "a", "temperature": NaN}', "number"),
        (b'{"prompt": "a", "temperature": 1e999}', "number"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}", "nested"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "prompt"),
        (b'{"messages": [{"role": "user"}]}', "messages"),
        (b'{"prompt": "a", "colour": 1}', "colour"),
        (b'{"prompt": "a", "session": ""}', "session"),
        (b'{"prompt": "a", "session": "a\\nb"}', "session"),
        (b'{"prompt": "a", "session": null}', "session"),
        (b'{"session": "a", "end_session": false}', "prompt"),
        (b'{"session": "a", "end_session": 1}', "end_session"),
        (b'{"prompt": "a", "end_session": true}', "end_session"),
        (b'{"prompt": "", "session": "a", "end_session": true}', "prompt"),
        (b'{"prompt": "a", "priority": 1}', "priority"),
        (b'{"prompt": "a", "priority": false}', "priority"),
        (b'{"prompt": "a", "v": 2}', "v must"),
        (b'{"prompt": "a", "v": true}', "v must"),
        (b'{"prompt": "a", "id": ""}', "id"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 1.0}', "max_tokens"),
        (b'{"prompt": "a", "seed": null}', "seed"),
        (b'{"prompt": "a", "stop": "x"}', "stop"),
        (b'{"prompt": "a", "timeout_s": 0}', "timeout_s"),
        (b'{"prompt": "a", "timeout_s": 1e6}', "timeout_s"),
        (b'{"prompt": "a", "regex": "b", "choices": ["c"]}', "choices"),
        (b'{"prompt": "a", "choices": "yes"}', "choices"),
        (b'{"prompt": "a", "template_vars": ["a"]}', "template_vars"),
        (b'{"prompt": "a", "template_vars": {"a b": 1}}', "template_vars"),
        (b'{"prompt": "a", "tools": {"name": "light"}}', "tools"),
        (b'{"prompt": "a", "tools": ["light"]}', "tools"),
        (b'{"messages": [{"role": "user", "content": null}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": []}]}', "messages"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}', "content"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}', "content"),
        (b'{"messages": [{"role": "user", "content": "a", "colour": 1}]}', "colour"),
        (b'{"messages": [{"role": "assistant", "tool_calls": {"name": "light"}}]}', "tool_calls"),
        (b'{"messages": [{"role": "tool", "content": "a", "tool_call_id": 1}]}', "tool_call_id"),
        (b'{"messages": [{"role": 1, "content": "a"}]}', "messages"),
        (b'{"prompt": "a", "json_schema": []}', None),
        (b'{"prompt": "a", "json_schema": true}', "json_schema"),
    ],
)
def test_a_rejection_names_the_key(payload: bytes, names: str | None) -> None:
    if names is None:
        assert _decode(payload).constraint is None
        return
    with pytest.raises(RequestError) as caught:
        _decode(payload)
    assert caught.value.code == "bad_request"
    assert names in caught.value.message


@pytest.mark.parametrize("payload", [b"play jazz", b'{"prompt": "play jazz"}', b' \r\n{"prompt": "play jazz"}'])
def test_a_byte_order_mark_is_removed(payload: bytes) -> None:
    assert _decode(b"\xef\xbb\xbf" + payload).prompt == "play jazz"


def test_keys_for_the_chat_template_are_not_changed() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "light", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "name": "light", "content": "on"},
    ]
    given = {"tools": [{"type": "function"}], "template_vars": {"enable_thinking": False, "date": "1 July"}}
    request = _decode({"messages": messages, **given})
    assert (request.messages, request.tools, request.template_vars) == (
        tuple(messages),
        tuple(given["tools"]),
        given["template_vars"],
    )
    assert _decode(write_request(request, None, with_properties=False)[0]) == dataclasses.replace(request, id="new")
    bare = _decode({"prompt": "a", "tools": [], "template_vars": {}})
    assert (bare.tools, bare.template_vars) == (None, None)


def test_all_keys_of_the_protocol_are_known() -> None:
    request = _decode(
        {"v": 1, "id": "a", "prompt": "p", "messages": [], "model": "m", "max_tokens": 256, "temperature": 0.7}
        | {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "stop": [], "logprobs": 0, "regex": "", "choices": []}
        | {"stream": False, "chunk_ms": 50, "timeout_s": 60, "priority": 0, "response_topic": "r"}
    )
    assert (request.id, request.prompt, request.messages, request.constraint, request.timeout_s) == (
        "a",
        "p",
        None,
        None,
        60.0,
    )
    assert set(request.sampling) == {"max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "logprobs"}


@pytest.mark.parametrize(
    ("correlation", "expected"),
    [(b"job-7", "job-7"), (b"\x00\xff", "00ff"), (b"\xff" * 65, None), (b"", "json"), (None, "json")],
)
def test_correlation_data_overrides_the_id_in_json(correlation: bytes | None, expected: str | None) -> None:
    envelope = parse_envelope(b'{"id": "json", "prompt": "a"}', Properties(correlation=correlation), "new")
    assert envelope.correlation == correlation
    assert envelope.id == expected if expected else len(envelope.id) == 64


def test_the_response_topic_property_overrides_the_json_key() -> None:
    body = b'{"prompt": "a", "response_topic": "json"}'
    assert parse_envelope(body, Properties(response_topic="property"), "new").response_topic == "property"
    assert parse_envelope(body, Properties(), "new").response_topic == "json"


@pytest.mark.parametrize(
    ("topic", "code"),
    [
        ("", "bad_request"),
        ("a/+/b", "bad_request"),
        ("a/#", "bad_request"),
        ("a\0b", "bad_request"),
        ("a\nb", "bad_request"),
        ("a\ufffe", "bad_request"),
        ("\ud800", "bad_request"),
        ("x" * 257, "bad_request"),
        ("é" * 129, "bad_request"),
        ("$SYS/broker", "forbidden"),
        ("edgelm/pi5/generate", "forbidden"),
        ("edgelm/other/generate/me", "forbidden"),
        ("edgelm/pi5/cancel", "forbidden"),
        ("edgelm/pi5/set/model", "forbidden"),
        ("edgelm/pi5/status", "forbidden"),
        ("edgelm/pool/p/generate", "forbidden"),
        ("homeassistant/device/x/config", "forbidden"),
    ],
)
def test_forbidden_response_topics(topic: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate_response_topic(topic)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "topic",
    ["some/reply", "edgelm/client/me/response", "edgelm/client/me/response/7", "edgelm/pi5/response", "/", "x" * 256],
)
def test_allowed_response_topics(topic: str) -> None:
    validate_response_topic(topic)
    with pytest.raises(RequestError) as caught:
        validate_response_topic(topic, ("nowhere/#", "only/here"))
    assert caught.value.code == "forbidden"


def test_request_topics_are_parsed() -> None:
    topics = BoardTopics("pi5")
    assert topics.parse("edgelm/pi5/generate") == RequestTopic("generate", None)
    assert topics.parse("edgelm/pi5/generate/kitchen") == RequestTopic("generate", "kitchen")
    assert topics.parse("edgelm/pi5/cancel/kitchen") == RequestTopic("cancel", "kitchen")
    assert topics.response() == "edgelm/pi5/response"
    assert topics.response("kitchen") == "edgelm/client/kitchen/response"
    for name in ("", "Kitchen", "a/b", "pool", "x" * 33):
        with pytest.raises(RequestError):
            topics.parse(f"edgelm/pi5/generate/{name}")


def _final(**changes: object) -> bytes:
    body = {"id": "a", "seq": 0, "done": True, "text": "", "finish_reason": "stop", "error": None, "usage": {}}
    body |= {"timing": {}, "board": "b", "model": "m", "boot_id": "c", "attempt": 1}
    return json.dumps({**body, **changes}).encode()


def test_what_a_newer_board_adds_is_passed_over() -> None:
    final = parse_response(_final(usage={"prompt_tokens": 3, "new": [1]}, timing={"tok_s": 1, "new": "x"}, new=1))
    assert isinstance(final, FinalMessage)
    assert (final.completion.usage.prompt_tokens, final.completion.timing.tok_s) == (3, 1)


@pytest.mark.parametrize(
    "changes",
    [{"usage": {"prompt_tokens": "3"}}, {"usage": None}, {"timing": {"tok_s": []}}, {"timing": {"ttft_ms": None}}],
    ids=str,
)
def test_a_response_with_values_of_the_wrong_type_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidResponseError):
        parse_response(_final(**changes))
