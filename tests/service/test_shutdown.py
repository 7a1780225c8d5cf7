"""A board that ends by SIGKILL or SIGTERM; TLS; secrets; errors of settings."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from broker import Broker
from mqtt_client import Client
from served_board import Process

from edgelm.cli import main

PROMPT = "Once upon a time"


def _status(client: Client, board: str, word: bytes) -> None:
    topic = f"edgelm/{board}/status"
    client.wait(lambda heard: [m.payload for m in client.on(topic)][-1:] == [word], f"{word!r}")


def test_sigkill_shows_offline_by_the_last_will(broker: Broker, served_bundle: str, tmp_path: Path) -> None:
    flags = ["--mqtt", broker.url, "--model", served_bundle, "--board", "killed"]
    with Client(broker.port, "edgelm/killed/status") as client, Process(tmp_path / "log", *flags) as board:
        _status(client, "killed", b"online")
        board.end(signal.SIGKILL)
        _status(client, "killed", b"offline")
    with Client(broker.port, "edgelm/killed/status") as newcomer:
        _status(newcomer, "killed", b"offline")
        assert newcomer.heard[0].retain


def test_sigterm_finishes_running_requests_and_rejects_new_ones(
    broker: Broker, served_bundle: str, tmp_path: Path
) -> None:
    flags = ["--mqtt", broker.url, "--model", served_bundle, "--board", "drained"]
    with (
        Client(broker.port, "reply/#", "edgelm/drained/+") as client,
        Process(tmp_path / "log", *flags, step_s=0.05, environment={"EDGELM_DRAIN_S": "30"}) as board,
    ):
        _status(client, "drained", b"online")
        body = {"prompt": PROMPT, "max_tokens": 60, "stream": True, "id": "running"}
        client.publish("edgelm/drained/generate", body, reply="reply/running")
        client.wait(lambda heard: client.on("reply/running"))
        board._process.send_signal(signal.SIGTERM)
        board.wait_for("stopping")
        client.publish("edgelm/drained/generate", {"prompt": PROMPT, "id": "late"}, reply="reply/late")
        assert client.final("late")["error"]["code"] == "draining"
        final = client.final("running")
        assert (final["finish_reason"], final["usage"]["completion_tokens"]) == ("length", 60)
        _status(client, "drained", b"offline")
        assert board.wait() == 0
        assert [m.payload for m in client.on("edgelm/drained/status")] == [b"online", b"offline"]


def test_sigterm_interrupts_requests_after_the_drain_time(broker: Broker, served_bundle: str, tmp_path: Path) -> None:
    flags = ["--mqtt", broker.url, "--model", served_bundle, "--board", "hurried", "--max-batch", "1"]
    with (
        Client(broker.port, "reply/#", "edgelm/hurried/status") as client,
        Process(tmp_path / "log", *flags, step_s=0.05, environment={"EDGELM_DRAIN_S": "0.5"}) as board,
    ):
        _status(client, "hurried", b"online")
        for name in ("running", "waiting"):
            body = {"prompt": PROMPT, "max_tokens": 400, "stream": True, "id": name}
            client.publish("edgelm/hurried/generate", body, reply=f"reply/{name}")
        client.wait(lambda heard: client.on("reply/running"))
        assert board.end(signal.SIGTERM) == 0
        running, waiting = client.final("running"), client.final("waiting")
        for final in (running, waiting):
            assert (final["finish_reason"], final["error"]["code"]) == ("error", "interrupted")
        assert running["text"]
        _status(client, "hurried", b"offline")


def test_the_password_is_in_no_log_message_or_process_list(served_bundle: str, tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-c", "-b", str(passwords), "me", "hunter2"], check=True, capture_output=True)
    protected = Broker(tmp_path, f"password_file {passwords}", anonymous=False).start()
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    secret.chmod(0o600)
    flags = ["--mqtt", protected.url, "--model", served_bundle, "--board", "private", "--username", "me"]
    try:
        with Process(tmp_path / "log", *flags, "--password-file", str(secret), "--log-format", "json") as board:
            board.wait_for("serving")
            arguments = Path(f"/proc/{board.pid}/cmdline").read_bytes()
            client = [
                "mosquitto_sub",
                "-p",
                str(protected.port),
                "-u",
                "me",
                "-P",
                "hunter2",
                "-t",
                "#",
                "-W",
                "2",
                "-v",
            ]
            heard = subprocess.run(client, capture_output=True, text=True, timeout=40, check=False).stdout
            assert board.end() == 0
            assert "edgelm/private/info" in heard
            assert "hunter2" not in board.log_text + heard + arguments.decode()
            assert all(json.loads(line)["level"] for line in board.log_text.splitlines())
        with Process(tmp_path / "log2", *flags, environment={"EDGELM_PASSWORD": "wrong"}) as board:
            assert board.wait() == 1
            assert "Not authorized" in board.log_text
            assert "wrong" not in board.log_text
    finally:
        protected.stop()


EC = ["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]


def _certificates(folder: Path) -> None:
    """Create a CA, and certificates signed by it for a broker at 127.0.0.1 and for a client."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    (folder / "v3").write_text("subjectAltName=IP:127.0.0.1\n")
    openssl("req", "-x509", "-newkey", *EC, "-nodes", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca")
    openssl("req", "-newkey", *EC, "-nodes", "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=broker")
    sign = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "v3", "-days", "2"]
    openssl("x509", "-req", "-in", "own.csr", "-out", "own.crt", *sign)
    openssl("req", "-newkey", *EC, "-nodes", "-keyout", "me.key", "-out", "me.csr", "-subj", "/CN=board")
    openssl("x509", "-req", "-in", "me.csr", "-out", "me.crt", *sign)


def test_tls_with_an_own_ca_and_a_client_certificate(served_bundle: str, tmp_path: Path) -> None:
    _certificates(tmp_path)
    lines = [
        f"{key} {tmp_path / name}"
        for key, name in [("cafile", "ca.crt"), ("certfile", "own.crt"), ("keyfile", "own.key")]
    ]
    secure = Broker(tmp_path, *lines, "require_certificate true").start()
    url = secure.url.replace("mqtt:", "mqtts:")
    ours = ["--certfile", str(tmp_path / "me.crt"), "--keyfile", str(tmp_path / "me.key")]
    trust = ["--cafile", str(tmp_path / "ca.crt"), *ours]
    flags = ["--mqtt", url, "--model", served_bundle, "--board", "secure"]
    try:
        with Process(tmp_path / "log", *flags, *trust) as board:
            board.wait_for("serving")
            command = [*board._command[:1], "-m", "edgelm", "ask", PROMPT, "--broker", url, "--board", "secure"]
            result = subprocess.run(
                [*command, "--max-tokens", "3", *trust], capture_output=True, text=True, timeout=60, check=False
            )
            assert result.returncode == 0, result.stderr
            assert result.stdout.strip()
            distrusted = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert distrusted.returncode == 1
            assert "not trusted" in distrusted.stderr
            assert board.end() == 0
        with Process(tmp_path / "log2", *flags) as board:
            board.wait_for("not trusted")
            assert board.end() == 0
    finally:
        secure.stop()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--model", "/nowhere"], "nowhere"),
        (["--board", "Pool Room"], "board"),
        (["--mqtt", "http://x"], "http"),
        (["--cafile", "/nowhere"], "cafile"),
        (["--queue", "0"], "queue"),
        (["--config", "/nowhere.toml"], "nowhere.toml"),
    ],
)
def test_a_bad_setting_is_reported_in_one_line(
    served_bundle: str, flags: list[str], names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", served_bundle, *flags]) == 1
    printed = capsys.readouterr().err
    assert names in printed
    assert printed.count("\n") == 1
