"""`edgelm devices smoke` with real inference and a real broker."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from edgelm_devices.smoke import INTENT, PROMPT, check_answer, run_smoke_test

from edgelm.cli import main
from edgelm.mqtt import local_broker


def needs_a_broker() -> None:
    if local_broker.find_mosquitto() is None:
        pytest.importorskip("amqtt", reason="no broker: apt-get install mosquitto, or pip install 'edgelm[broker]'")


def test_a_good_board_passes(bundle: Path, capsys):
    needs_a_broker()
    assert main(["devices", "smoke", "--bundle", str(bundle), "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"]
    assert [checks[name]["status"] for name in ("load", "answer", "again", "mqtt")] == ["ok"] * 4
    assert report["tokens"] == checks["answer"]["values"]["tokens"] != []
    assert checks["mqtt"]["values"]["elapsed_ms"] >= checks["mqtt"]["values"]["inference_ms"] > 0
    assert checks["memory"]["values"]["rss_peak_mb"] > 10


def test_the_report_has_one_line_a_check(bundle: Path, capsys):
    needs_a_broker()
    assert main(["devices", "smoke", "--bundle", str(bundle), "--prompt", "two\nlines"]) == 0
    *lines, verdict = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("ok")] == ["load", "answer", "again", "mqtt"]
    assert verdict == "all checks passed"


def test_the_smoke_test_uses_the_embedded_broker_without_mosquitto(bundle: Path, monkeypatch):
    pytest.importorskip("amqtt", reason="pip install 'edgelm[broker]'")
    monkeypatch.setattr(local_broker, "find_mosquitto", lambda: None)
    check = next(check for check in run_smoke_test(str(bundle), threads=1).checks if check.name == "mqtt")
    assert check.status == "ok"
    assert "amqtt" in check.message


def test_without_a_broker_the_mqtt_check_is_skipped_with_a_remedy(bundle: Path, monkeypatch):
    monkeypatch.setattr(local_broker, "find_mosquitto", lambda: None)
    monkeypatch.setitem(sys.modules, "amqtt.broker", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "edgelm.mqtt.amqtt_broker", raising=False)
    report = run_smoke_test(str(bundle), threads=1)
    check = next(check for check in report.checks if check.name == "mqtt")
    assert (check.status, report.ok) == ("skipped", True)
    assert "apt-get install mosquitto" in check.message


def test_a_damaged_bundle_fails_the_board(bundle: Path, tmp_path: Path, capsys):
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    tokenizer = damaged / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    assert main(["devices", "smoke", "--bundle", str(damaged)]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "tokenizer.json" in out


def test_an_unexpected_answer_fails(model):
    """A random model does not generate the intent of the built-in model."""
    check = check_answer(model.generate(PROMPT, max_tokens=8, temperature=0.0), INTENT)
    assert check.status == "failed"
    assert INTENT in check.message


def test_the_builtin_bundle_passes():
    builtin = Path(sys.modules["edgelm"].__file__).parent / "builtin"
    if not (builtin / "manifest.json").is_file():
        pytest.skip("the built-in bundle is not there: see edgelm/builtin/README.md")
    report = run_smoke_test()
    answer = next(check for check in report.checks if check.name == "answer")
    assert answer.status == "ok"
    assert json.loads(answer.message)["intent"] == "PlayMusic"
    assert report.ok
