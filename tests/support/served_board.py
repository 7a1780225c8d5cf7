"""A board under test: on a thread of this process, or as an `edgelm serve` process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import edgelm.mqtt.service_setup
from edgelm.engine.engine import Engine
from edgelm.mqtt.service import Service
from edgelm.mqtt.service_config import ServeConfig
from edgelm.mqtt.service_setup import open_service
from edgelm.types import Chunk

PATIENCE_S = 40.0


class SlowEngine(Engine):
    """An engine whose steps take `step_s` longer, and that raises `failure` if it is set."""

    step_s = 0.0
    failure: BaseException | None = None

    def step(self) -> list[Chunk]:
        time.sleep(self.step_s)
        if self.failure is not None:
            raise self.failure
        return super().step()


@contextmanager
def serving(
    config: ServeConfig, monkeypatch: pytest.MonkeyPatch | None = None, step_s: float = 0.0
) -> Iterator[Service]:
    """Serve on a thread; with `monkeypatch` use a `SlowEngine`. Raises the exception of the service."""
    if monkeypatch is not None:
        monkeypatch.setattr(SlowEngine, "step_s", step_s)
        monkeypatch.setattr(SlowEngine, "failure", None)
        monkeypatch.setattr(edgelm.mqtt.service_setup, "Engine", SlowEngine)
    online, raised = threading.Event(), []
    with open_service(config, online.set) as service:

        def run() -> None:
            try:
                service.run()
            except BaseException as error:  # noqa: BLE001  raised again by the caller
                raised.append(error)
                online.set()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert online.wait(PATIENCE_S), "the board did not come online"
            if not raised:
                yield service
        finally:
            service.stop()
            service.stop()
            thread.join(PATIENCE_S)
        assert not thread.is_alive(), "the service did not stop"
        if raised:
            raise raised[0]


class Process:
    """An `edgelm serve` process. Use it as a context manager; the process is killed at the end if it still runs."""

    def __init__(self, log: Path, *flags: str, step_s: float = 0.0, environment: dict[str, str] | None = None) -> None:
        self._log = log
        self._command = [sys.executable, str(Path(__file__).with_name("serve_slowly.py")), str(step_s), "serve", *flags]
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Process:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE_S)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log_text(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Return when the log contains `text` at least `times` times."""
        until = time.monotonic() + PATIENCE_S
        while self.log_text.count(text) < times:
            assert time.monotonic() < until, f"{text!r} was not logged: {self.log_text}"
            assert self._process.poll() is None or text in self.log_text, f"ended: {self.log_text}"
            time.sleep(0.05)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal; return the exit code."""
        self._process.send_signal(number)
        return self._process.wait(PATIENCE_S)

    def wait(self) -> int:
        return self._process.wait(PATIENCE_S)
