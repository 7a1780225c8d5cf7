"""Codecs: encoding and decoding are inverse for every field, and any bytes give a message or the documented error."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import STATUS_OF_CODE, RequestError
from edgelm.mqtt.packets import Properties
from edgelm.mqtt.request_codec import (
    MAX_CHUNK_MS,
    MAX_ID_LENGTH,
    MAX_TIMEOUT_S,
    GenerateRequest,
    parse_envelope,
    parse_request,
    write_request,
)
from edgelm.mqtt.response_codec import (
    FinalMessage,
    InvalidResponseError,
    ResponseChunk,
    make_response_properties,
    parse_response,
    write_chunk,
    write_final_message,
)
from edgelm.mqtt.topics import MAX_RESPONSE_TOPIC_BYTES, filter_matches, validate_response_topic
from edgelm.types import RANGES, Completion, Constraint, Timing, TokenLogprob, Usage

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SOME_TEXT = TEXT.filter(bool)
IDS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=MAX_ID_LENGTH)
COUNTS = st.integers(0, 10**6)


def _number(name: str) -> st.SearchStrategy[float]:
    low, high = RANGES[name]
    return st.integers(int(low), int(high)) if isinstance(low, int) else st.floats(low, high)


SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        **{name: _number(name) for name in RANGES},
        "stop": st.lists(SOME_TEXT, max_size=16).map(tuple),
        "ignore_eos": st.booleans(),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)
CONSTRAINTS = st.one_of(
    st.none(),
    st.dictionaries(TEXT, JSON, max_size=4).map(
        lambda schema: Constraint("json_schema", json.dumps(schema, ensure_ascii=False))
    ),
    SOME_TEXT.map(lambda pattern: Constraint("regex", pattern)),
    st.lists(SOME_TEXT, min_size=1).map(lambda words: Constraint("choices", tuple(words))),
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), min_size=1, max_size=4).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> GenerateRequest:
    session = draw(st.none() | IDS)
    ends = session is not None and draw(st.booleans())
    form = draw(st.sampled_from(["prompt", "messages", "nothing"] if ends else ["prompt", "messages"]))
    return GenerateRequest(
        id=draw(IDS),
        prompt=draw(SOME_TEXT) if form == "prompt" else None,
        messages=draw(MESSAGES) if form == "messages" else None,
        model=draw(st.none() | TEXT),
        sampling=draw(SAMPLING),
        constraint=draw(CONSTRAINTS),
        stream=draw(st.booleans()),
        chunk_ms=draw(st.integers(0, MAX_CHUNK_MS)),
        timeout_s=draw(st.none() | st.floats(0.001, MAX_TIMEOUT_S)),
        session=session,
        end_session=ends,
    )


@given(requests(), st.booleans(), st.none() | SOME_TEXT)
def test_a_request_is_decoded_as_it_was_encoded(
    request: GenerateRequest, with_properties: bool, reply: str | None
) -> None:
    payload, properties = write_request(request, reply, with_properties=with_properties)
    envelope = parse_envelope(payload, properties, "new")
    assert parse_request(envelope) == request
    assert envelope.response_topic == reply
    assert (properties == Properties()) == (not with_properties)


ERRORS = st.builds(
    RequestError, st.sampled_from(sorted(STATUS_OF_CODE)), TEXT, retry_after_s=st.none() | st.floats(0, 1000)
)
MILLISECONDS = st.floats(0, 1e7).map(lambda value: round(value, 3))


@st.composite
def final_messages(draw: st.DrawFn) -> FinalMessage:
    reason = draw(st.sampled_from(["stop", "length", "cancelled", "deadline", "error"]))
    alternatives = st.lists(st.tuples(COUNTS, st.floats(-100, 0)), max_size=3).map(tuple)
    logprobs = st.lists(st.builds(TokenLogprob, COUNTS, st.floats(-100, 0), alternatives), max_size=3).map(tuple)
    completion = Completion(
        id=draw(IDS),
        text=draw(TEXT | st.sampled_from(["1e999", "[[1, NaN]]", '{"a": 1}', "[" * 3000])),
        tokens=tuple(draw(st.lists(COUNTS, max_size=5))),
        finish_reason=reason,
        usage=draw(st.builds(Usage, COUNTS, COUNTS, COUNTS, COUNTS)),
        timing=draw(st.builds(Timing, MILLISECONDS, MILLISECONDS, MILLISECONDS, MILLISECONDS)),
        logprobs=draw(st.none() | logprobs),
        error=draw(ERRORS) if reason == "error" else None,
        turn=draw(st.none() | COUNTS),
    )
    return FinalMessage(completion, draw(COUNTS), draw(TEXT), draw(TEXT), draw(TEXT), draw(COUNTS))


def _fields(final: FinalMessage) -> dict[str, object]:
    """Return all fields of a final message, its error as a dictionary."""
    completion = {name: getattr(final.completion, name) for name in Completion.__dataclass_fields__}
    error = completion.pop("error")
    rest = {name: getattr(final, name) for name in FinalMessage.__dataclass_fields__ if name != "completion"}
    return {**completion, **rest, "error": error and error.to_dict()}


@given(final_messages())
def test_a_final_message_is_decoded_as_it_was_encoded(final: FinalMessage) -> None:
    payload = write_final_message(final)
    back = parse_response(payload)
    assert isinstance(back, FinalMessage)
    expected = _fields(final)
    if final.completion.text == "1e999":  # JSON does not have this number: `json` and `logprobs` are left out
        expected["logprobs"] = None
    assert _fields(back) == expected
    assert (json.loads(payload)["error"] is None) == (final.completion.finish_reason in {"stop", "length"})


@given(IDS, COUNTS, TEXT)
def test_a_chunk_is_decoded_as_it_was_encoded(request_id: str, seq: int, text: str) -> None:
    assert parse_response(write_chunk(ResponseChunk(request_id, seq, text))) == ResponseChunk(request_id, seq, text)


KEY_NAMES = """v id prompt messages model stream chunk_ms timeout_s response_topic session end_session priority
json_schema regex choices max_tokens seed stop temperature logprobs"""
KEYS = st.sampled_from(KEY_NAMES.split())
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(), inner, max_size=4),
)
PAYLOADS = st.one_of(
    st.binary(),
    ANY_JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(KEYS, ANY_JSON, max_size=5).map(lambda value: json.dumps(value).encode()),
)


@given(PAYLOADS, st.none() | st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_bad_request(payload: bytes, correlation: bytes | None) -> None:
    envelope = parse_envelope(payload, Properties(correlation=correlation), "new")
    assert 0 < len(envelope.id) <= MAX_ID_LENGTH
    assert envelope.id.isprintable()
    assert envelope.correlation == correlation
    error = None
    try:
        request = parse_request(envelope)
    except RequestError as refusal:
        error = refusal
    if error is not None:
        assert error.code == "bad_request"
        assert error.message
        return
    assert request.id == envelope.id
    payload_again, properties = write_request(request, None, with_properties=False)
    assert parse_request(parse_envelope(payload_again, properties, "other")) == request


@given(PAYLOADS)
def test_any_bytes_are_a_response_or_invalid(payload: bytes) -> None:
    with contextlib.suppress(InvalidResponseError):
        parse_response(payload)


@given(st.floats(-10, 1e6), st.none() | st.binary(), st.none() | ERRORS)
def test_a_response_has_a_status_and_a_positive_expiry(
    left_s: float, correlation: bytes | None, error: RequestError | None
) -> None:
    properties = make_response_properties(correlation, left_s, error)
    assert properties.correlation == correlation
    assert properties.expiry_s is not None
    assert properties.expiry_s >= max(1, left_s)
    assert properties.user == (("status", "200" if error is None else str(STATUS_OF_CODE[error.code])),)


LEVELS = st.text("ab+#$/éx\x00\x01\x7f\ufffe", max_size=12)


@given(LEVELS | st.text())
def test_an_allowed_response_topic_can_be_published(topic: str) -> None:
    try:
        validate_response_topic(topic)
    except RequestError:
        return
    assert 0 < len(topic.encode()) <= MAX_RESPONSE_TOPIC_BYTES
    assert not set(topic) & {"+", "#", "\0", "\x01", "\x7f", "\ufffe"}
    assert not topic.startswith("$")


@given(st.lists(st.text("ab", max_size=3), min_size=1, max_size=4), st.data())
def test_a_filter_made_from_a_topic_matches_it(levels: list[str], data: st.DataObject) -> None:
    topic = "/".join(levels)
    chosen = [data.draw(st.sampled_from([level, "+"])) for level in levels]
    assert filter_matches("/".join(chosen), topic)
    kept = chosen[: data.draw(st.integers(0, len(levels)))]
    assert filter_matches("/".join([*kept, "#"]), topic)
    assert not filter_matches("/".join([*chosen, "x"]), topic)


@pytest.mark.parametrize(
    "key", ["prompt", "messages", "seed", "stop", "stream", "chunk_ms", "timeout_s", "regex", "session", "end_session"]
)
def test_the_message_names_the_key(key: str) -> None:
    body = {"prompt": "hi", key: {"not": "this"}}
    with pytest.raises(RequestError, match=key) as caught:
        parse_request(parse_envelope(json.dumps(body).encode(), Properties(), "new"))
    assert caught.value.code == "bad_request"
