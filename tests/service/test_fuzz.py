"""A short run of the request fuzzer; `python -m tests.fuzzing.requests` is the long run."""

from __future__ import annotations

import json

import pytest
from broker import need_mosquitto
from fuzzing import messages, requests

COUNT, MAX_SECONDS = 1500, 30.0
MAX_WAIT_S = 8.0
"""Maximum wait of another client on a machine with other load; the long run allows 1 s."""
MAX_GROWTH_MB = 150
"""Maximum growth of memory. It includes the caches, which a short run does not fill; the long run allows 20 MB."""


@pytest.fixture(scope="module")
def report() -> requests.Report:
    need_mosquitto()
    return requests.run(COUNT, 1, max_seconds=MAX_SECONDS, quiet_s=1.0)


def test_each_fuzzed_request_has_one_typed_final(report: requests.Report) -> None:
    assert report.sent > COUNT / 10, report
    assert not report.findings, report
    assert {"bad_request", "too_large", "stop", "length"} <= set(report.codes), report


def test_another_client_is_answered_meanwhile(report: requests.Report) -> None:
    assert report.waits_s, report
    assert report.worst_s < report.quiet_s + MAX_WAIT_S, report


def test_memory_growth_is_bounded(report: requests.Report) -> None:
    assert report.growth_mb < MAX_GROWTH_MB, report


def test_requests_depend_only_on_seed_and_number() -> None:
    assert [messages.message(7, number) for number in range(300)] == [messages.message(7, n) for n in range(300)]
    assert messages.message(7, 1) != messages.message(8, 1)


def test_all_kinds_of_requests_are_generated() -> None:
    made = [messages.message(1, number) for number in range(COUNT)]
    assert {each.action for each in made} == {"generate", "cancel"}
    assert any(each.is_constrained for each in made)
    assert any(len(each.correlation or b"") == messages.MAX_CORRELATION_BYTES for each in made)
    assert any(each.expiry_s == 2**32 - 1 for each in made)
    assert any(each.payload.count(b"[") > 3000 for each in made)
    assert any(not each.is_strict for each in made)
    for key in ("session", "tools", "template_vars", "regex", "json_schema", "choices", "response_topic"):
        assert any(f'"{key}"'.encode() in each.payload for each in made), key


class Heard:
    """A message as paho passes it to a callback."""

    topic = "fuzz/x"

    def __init__(self, number: int, **body: object) -> None:
        self.payload = json.dumps({"done": True, "finish_reason": "stop", "error": None, **body}).encode()
        self.properties = type("Properties", (), {"CorrelationData": b"#%010d" % number})


@pytest.mark.parametrize(
    ("heard", "words"),
    [
        ([Heard(1)], ""),
        ([Heard(1), Heard(2)], ""),
        ([Heard(1), Heard(1)], "2 finals"),
        ([Heard(1, finish_reason="unheard")], "unheard"),
        ([Heard(1, finish_reason="error", error={"code": "bad_request", "message": "x"})], ""),
        ([Heard(1, finish_reason="error", error={"code": "odd", "message": "x"})], "odd"),
        ([Heard(1, finish_reason="error", error={"code": "internal", "message": "a fault"})], "a fault"),
    ],
)
def test_findings_of_the_fuzzer(monkeypatch: pytest.MonkeyPatch, heard: list[Heard], words: str) -> None:
    monkeypatch.setattr(requests.Link, "__init__", lambda self, *_: None)
    report = requests.Report()
    attack = requests.Attack(0, report)
    for each in heard:
        attack._take(each)
    assert len(report.findings) == bool(words), report
    assert words in "".join(report.findings)
    attack._open[b"#%010d" % 9] = (9, -1e9, True, False)
    attack._drop_overdue()
    assert "request 9 has no final" in report.findings[-1]
