"""Settings of the service: sources, invalid values, and secrets."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import ConfigError
from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl
from edgelm.mqtt.service_config import (
    NAME_PATTERN,
    RESERVED_NAMES,
    SETTINGS,
    ServeConfig,
    check_topic_name,
    default_board,
    load_config,
)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('board = "from-file"\nqueue = 1\nmax_batch = 2\nreply_topics = ["a/#", "b"]\n')
    environment = {"EDGELM_QUEUE": "3", "EDGELM_MAX_BATCH": "5", "EDGELM_EMBEDDED_BROKER": "yes", "PATH": "/bin"}
    config = load_config(file, environment, {"max_batch": 7, "queue": None})
    assert config.board == "from-file"
    assert (config.queue, config.max_batch, config.embedded_broker) == (3, 7, True)
    assert config.reply_topics == ("a/#", "b")
    assert config.mqtt == "mqtt://localhost:1883"
    assert load_config(None, {}, {}) == ServeConfig()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("quue = 1", "quue"),
        ("queue = '1'", "queue"),
        ("queue = true", "queue"),
        ("queue = 0", "queue"),
        ("board = 'Pi 5'", "board"),
        ("board = 'pool'", "board"),
        ("log_format = 'xml'", "log_format"),
        ("mqtt = 'http://x'", "http"),
        ("reply_topics = []", "reply_topics"),
        ("password = 'hunter2'", "password_file"),
        ("queue 1", "TOML"),
        ("queue = " + "[" * 5000 + "]" * 5000, "TOML"),
        ("queue = " + "9" * 10_000, "TOML"),
        ("queue = 0x" + "f" * 10_000, "queue"),
        ("queue = " + "[" * 90 + "]" * 90, "queue"),
        ("drain_s = nan", "drain_s"),
        ("drain_s = inf", "drain_s"),
        ("model = ['a', 1]", r"model\[1\]"),
        ("username = ''", "username"),
        ("max_bach = 1", "max_batch"),
        ('board = "a\\nb"', "board"),
    ],
)
def test_an_error_in_a_file_names_the_setting(tmp_path: Path, text: str, names: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=names) as caught:
        load_config(file, {}, {})
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EDGELM_QUUE", "1"),
        ("EDGELM_QUEUE", "many"),
        ("EDGELM_EMBEDDED_BROKER", "maybe"),
        ("EDGELM_MAX_TIMEOUT_S", "-1"),
    ],
)
def test_an_error_in_a_variable_names_the_setting(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"(?i){name.removeprefix('EDGELM_')}"):
        load_config(None, {name: value}, {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_config(tmp_path / "none.toml", {}, {})


@given(
    st.sampled_from(sorted(set(SETTINGS) - {"password"})), st.binary(max_size=3) | st.none() | st.lists(st.integers())
)
def test_a_value_of_the_wrong_type_is_refused_or_is_the_default(name: str, value: object) -> None:
    if value is None and SETTINGS[name].default is None:
        return
    with pytest.raises(ConfigError, match=name):
        ServeConfig(**{name: value})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mqtt://pi", BrokerUrl("mqtt", "pi", 1883)),
        ("mqtts://pi", BrokerUrl("mqtts", "pi", 8883)),
        ("mqtt://me@pi:1", BrokerUrl("mqtt", "pi", 1, username="me")),
        ("ws://pi:8080/socket", BrokerUrl("ws", "pi", 8080, "/socket")),
        ("mqtt://[::1]:1883", BrokerUrl("mqtt", "::1", 1883)),
        ("unix:///run/m.sock", BrokerUrl("unix", "/run/m.sock", 0)),
    ],
)
def test_urls(text: str, expected: BrokerUrl) -> None:
    url = BrokerUrl.parse(text)
    assert url == expected
    if url.username is None:
        assert BrokerUrl.parse(str(url)) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pi",
        "mqtt://",
        "mqtt://pi:0",
        "mqtt://pi:99999",
        "mqtt://pi/path",
        "http://pi",
        "unix://",
        "mqtt://" + "a" * 64,
    ],
)
def test_invalid_urls(text: str) -> None:
    with pytest.raises(ConfigError):
        BrokerUrl.parse(text)


@given(st.text())
def test_any_text_is_a_url_or_a_config_error(text: str) -> None:
    for candidate in (text, f"mqtt://{text}"):
        with contextlib.suppress(ConfigError):
            assert BrokerUrl.parse(candidate).host


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    for url in ("mqtt://me:hunter2@pi", "http://me:hunter2@pi", "mqtt://me:hunter2@pi:99999"):
        with pytest.raises(ConfigError) as caught:
            BrokerUrl.parse(url)
        assert "hunter2" not in str(caught.value)


def test_the_password_file_must_be_private(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    file.chmod(0o644)
    config = ServeConfig(username="me", password_file=str(file))
    with pytest.raises(ConfigError, match="chmod 600"):
        _ = config.broker
    file.chmod(0o600)
    assert config.broker.password == "hunter2"
    assert "hunter2" not in repr(config) + str(config.broker)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the owner of a file")
def test_a_password_file_of_another_user_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("hunter2\n")
    file.chmod(0o600)
    os.chown(file, 65534, 65534)
    with pytest.raises(ConfigError, match="uid 65534"):
        _ = ServeConfig(username="me", password_file=str(file)).broker


@pytest.mark.parametrize("name", ["EDGELM_SERVICE_PORT", "EDGELM_PORT_1883_TCP_ADDR", "EDGELM_X"])
def test_unknown_variables_are_logged_and_ignored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load_config(None, {name: "1", "EDGELM_QUEUE": "3"}, {}).queue == 3
    (record,) = caplog.records
    assert name in record.getMessage()


@pytest.mark.parametrize(
    "url",
    [
        "mqtt://bob:secret@@h:xx",
        "mqtt://bob:sec/secret@h:1883",
        "bob:secret@host",
        "mqtt://bob:secret@h:99999",
        "mqtt://bob:secret@h",
        "http://bob:secret@h",
        "mqtt://h:secret@",
    ],
)
def test_a_password_in_a_broker_url_is_never_shown(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BrokerUrl.parse(url)
    assert "secret" not in str(caught.value)


def test_the_password_of_the_environment_is_not_shown() -> None:
    config = load_config(None, {"EDGELM_PASSWORD": "hunter2", "EDGELM_USERNAME": "me"}, {})
    assert config.broker.password == "hunter2"
    assert "hunter2" not in repr(config) + repr(config.broker)
    with pytest.raises(ConfigError, match="user name"):
        _ = load_config(None, {"EDGELM_PASSWORD": "hunter2"}, {}).broker


def test_the_default_board_is_an_allowed_name() -> None:
    check_topic_name("board", default_board())


@given(st.text("aZ09_-/+# ", max_size=40))
def test_allowed_names(name: str) -> None:
    if NAME_PATTERN.fullmatch(name) and name not in RESERVED_NAMES:
        check_topic_name("board", name)
    else:
        with pytest.raises(ConfigError, match="board"):
            check_topic_name("board", name)


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("mqtt://broker.example", "mqtts://"),
        ("mqtt://192.0.2.1:1883", "mqtts://"),
        ("ws://[2001:db8::1]:80/mqtt", "wss://"),
        ("mqtts://broker.example", ""),
        ("mqtt://localhost", ""),
        ("mqtt://127.8.8.8", ""),
        ("mqtt://[::1]", ""),
        ("unix:///run/mosquitto.sock", ""),
    ],
)
def test_an_unencrypted_password_is_warned_of(url: str, warned: str, caplog: pytest.LogCaptureFixture) -> None:
    broker = BrokerConfig(url=BrokerUrl.parse(url), username="me", password="hunter2")
    broker.warn_if_unencrypted()
    assert len(caplog.messages) == (1 if warned else 0)
    assert warned in caplog.text
    assert "hunter2" not in caplog.text
    caplog.clear()
    BrokerConfig(url=BrokerUrl.parse(url), username="me").warn_if_unencrypted()
    assert not caplog.messages


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    files = {name: tmp_path / name for name in ("certificate", "key")}
    for file in files.values():
        file.write_text("x")
        file.chmod(0o644)
    files["key"].chmod(mode)
    url = BrokerUrl.parse("mqtts://broker.example")
    both = {"certfile": str(files["certificate"]), "keyfile": str(files["key"])}
    with pytest.raises(ConfigError, match=r"keyfile: .*chmod 600"):
        BrokerConfig(url=url, **both)
    files["key"].chmod(0o600)
    BrokerConfig(url=url, **both)
    with pytest.raises(ConfigError, match=r"certfile.*chmod 600"):
        BrokerConfig(url=url, certfile=str(files["certificate"]))
