"""mosquitto on a free loopback port with a configuration for tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from edgelm.mqtt.local_broker import find_mosquitto, free_port

PATIENCE_S = 20.0


def need_mosquitto() -> str:
    """Return the path of mosquitto; skip the test if it is not installed."""
    program = find_mosquitto()
    if program is None:
        pytest.skip("mosquitto is not installed: apt install mosquitto mosquitto-clients")
    return program


class Broker:
    """A mosquitto process. `lines` are added to its configuration."""

    def __init__(self, folder: Path, *lines: str, anonymous: bool = True) -> None:
        self.port = free_port()
        self._program = need_mosquitto()
        self._config = folder / "mosquitto.conf"
        self._log = folder / "mosquitto.log"
        user = (
            ["user root"] if os.geteuid() == 0 else []
        )  # otherwise mosquitto changes to a user that cannot read these files
        allow = f"allow_anonymous {str(anonymous).lower()}"
        listener = f"listener {self.port} 127.0.0.1"
        self._config.write_text("\n".join([*user, listener, allow, "set_tcp_nodelay true", *lines]) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> Broker:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([self._program, "-c", str(self._config)], stdout=log, stderr=log)
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self._process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    return self
            except OSError:
                time.sleep(0.02)
        self.stop()
        raise AssertionError(f"mosquitto did not start: {self._log.read_text()}")

    def kill(self) -> None:
        """Kill it, as at a power failure."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(PATIENCE_S)
            self._process = None
