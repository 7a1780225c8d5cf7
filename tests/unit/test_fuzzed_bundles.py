"""A short run of the fuzzer of bundles and checkpoints: `python -m tests.fuzzing.bundles` is the long one."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from fuzzing import bundles, cases

COUNT, MOST_S = 80, 40.0


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzing") / "work"
    cases.prepare(folder)
    return folder


def test_changed_bundles_and_checkpoints_come_to_an_answer_or_one_error(work):
    report = bundles.run(work, range(COUNT), 1, most_s=MOST_S)
    assert not report.findings, report
    assert report.done > 10, report
    assert report.answered > 0, report


def test_a_case_is_the_same_every_time(work, tmp_path):
    said = []
    for turn in ("first", "second"):
        (tmp_path / turn).mkdir()
        case = cases.Case(work, 1, 3)
        case.run(tmp_path / turn)
        said.append((case.what, [each.split("refused")[0] for each in case.said]))
    assert said[0] == said[1]
    assert said[0][1]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("time.sleep(60)", "longer than"),
        ("raise KeyError(3)", "KeyError"),
        ("raise BaseException('a panic')", "a panic"),
        ("warnings.warn('odd')", "odd"),
        ("self._step('x', lambda: cases.edgelm.load('nowhere'))", ""),
    ],
)
def test_what_the_fuzzer_takes_for_a_finding(work, monkeypatch, what, words):
    monkeypatch.setattr(bundles, "MOST_S", 3.0)
    lines = ["import os, time, warnings", "from tests.fuzzing import cases", f"def run(self, folder): {what}"]
    before = "\n".join([*lines, "cases.Case.run = run"])
    report = bundles.run(work, range(1), 1, before=before)
    assert len(report.findings) == bool(words), report
    assert words in "".join(report.findings)
