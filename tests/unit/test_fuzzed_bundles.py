"""A short run of the fuzzer of bundles and checkpoints; `python -m tests.fuzzing.bundles` is the long one."""

from __future__ import annotations

import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from fuzzing import bundles, cases

COUNT, RUN_LIMIT_S = 80, 40.0


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzzing") / "work"
    cases.prepare(folder)
    return folder


def test_changed_bundles_and_checkpoints_give_a_completion_or_one_error(work):
    report = bundles.run(work, range(COUNT), 1, max_seconds=RUN_LIMIT_S)
    assert not report.findings, report
    assert report.done > 10, report
    assert report.answered > 0, report


def test_a_case_is_the_same_every_time(work, tmp_path):
    outcomes = []
    for turn in ("first", "second"):
        (tmp_path / turn).mkdir()
        case = cases.Case(work, 1, 3)
        case.run(tmp_path / turn)
        outcomes.append((case.what, [each.split("refused")[0] for each in case.outcomes]))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("time.sleep(60)", "longer than"),
        ("raise KeyError(3)", "KeyError"),
        ("raise BaseException('a panic')", "a panic"),
        ("warnings.warn('odd')", "odd"),
        ("self._step('x', lambda: cases.edgelm.load('nowhere'))", ""),
    ],
)
def test_the_fuzzer_reports_findings(work, monkeypatch, code, expected):
    monkeypatch.setattr(bundles, "CASE_TIMEOUT_S", 3.0)
    lines = ["import os, time, warnings", "from tests.fuzzing import cases", f"def run(self, folder): {code}"]
    before = "\n".join([*lines, "cases.Case.run = run"])
    report = bundles.run(work, range(1), 1, before=before)
    assert len(report.findings) == bool(expected), report
    assert expected in "".join(report.findings)
