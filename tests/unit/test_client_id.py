"""The client id of a board, and the choice of the MQTT version."""

from __future__ import annotations

import re
import stat

import pytest

from edgelm.mqtt.client_id import load_client_id


def test_the_client_id_is_random_and_stored(tmp_path):
    first = load_client_id("pi5", tmp_path / "state")
    assert re.fullmatch("edgelm-pi5-[0-9a-f]{16}", first)
    assert load_client_id("pi5", tmp_path / "state") == first
    assert load_client_id("pi5", tmp_path / "other") != first
    assert load_client_id("pi4", tmp_path / "state")[-16:] != first[-16:]
    (file,) = (tmp_path / "state").glob("client-pi5")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("content", ["", "pi5", "0" * 17, "x" * 16, "é"])
def test_an_invalid_stored_id_is_replaced(tmp_path, content):
    (tmp_path / "client-pi5").write_text(content, "utf-8")
    found = load_client_id("pi5", tmp_path)
    assert re.fullmatch("edgelm-pi5-[0-9a-f]{16}", found)


def test_an_id_that_cannot_be_stored_is_valid_for_one_run(tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")
    first, second = (load_client_id("pi5", tmp_path / "state") for _ in range(2))
    assert first != second


def test_the_version_is_not_changed_twice_within_the_interval(monkeypatch):
    from edgelm.mqtt import version_negotiation

    now = [100.0]
    monkeypatch.setattr(version_negotiation.time, "monotonic", lambda: now[0])
    negotiation = version_negotiation.VersionNegotiation("5")
    changes = 0
    for _ in range(100):
        negotiation.on_connect_sent()
        changes += negotiation.on_closed()
        negotiation.on_reconnect()
        now[0] += 0.01
    assert changes == 1
    now[0] += version_negotiation.CHANGE_INTERVAL_S
    negotiation.on_connect_sent()
    assert negotiation.on_closed()
