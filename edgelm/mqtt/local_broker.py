"""Brokers that this process starts and stops: mosquitto as a subprocess, or amqtt on a thread."""

from __future__ import annotations

import asyncio
import logging
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from edgelm.errors import EdgelmError
from edgelm.mqtt.broker_config import is_loopback
from edgelm.system.installation import missing_extra

log = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0


def free_port() -> int:
    """Return a free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def find_mosquitto() -> str | None:
    """Return the path of mosquitto, or None. Debian installs it in a folder that is in root's PATH only."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


class LocalBroker(ABC):
    """A broker that runs during a `with` block. Every user of this machine can connect to it."""

    name: str
    port: int

    @property
    def url(self) -> str:
        """The broker URL."""
        return f"mqtt://{LOOPBACK}:{self.port}"

    def __enter__(self) -> LocalBroker:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @abstractmethod
    def start(self) -> None:
        """Start the broker; return when it accepts connections."""

    @abstractmethod
    def stop(self) -> None:
        """Stop the broker; return when it has stopped."""


class Mosquitto(LocalBroker):
    """mosquitto with its own configuration, on a free port."""

    def __init__(self, program: str) -> None:
        self.name = "mosquitto"
        self.port = free_port()
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start mosquitto. Raises `EdgelmError` with its last output line if it does not start."""
        self._folder = tempfile.TemporaryDirectory(prefix="edgelm-broker-")
        config = Path(self._folder.name) / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} {LOOPBACK}\nallow_anonymous true\npersistence false\nset_tcp_nodelay true\n",
            "utf-8",
        )
        log_file = Path(self._folder.name) / "log"
        with log_file.open("wb") as output:
            self._process = subprocess.Popen(
                [self._program, "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C must not end it before the board has disconnected
            )
        try:
            _wait_for_port(LOOPBACK, self.port, lambda: self._process is None or self._process.poll() is not None)
        except BaseException as error:
            output_lines = log_file.read_text("utf-8", "replace").strip().splitlines()
            self.stop()
            if isinstance(error, EdgelmError) and output_lines:
                raise EdgelmError(f"mosquitto did not start: {output_lines[-1]}") from error
            raise

    def stop(self) -> None:
        """End the mosquitto process."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class EmbeddedBroker(LocalBroker):
    """amqtt on a thread: supports MQTT 3.1.1 only and stores nothing, for tests and demos. Limits: `amqtt_broker`.

    Parameters
    ----------
    host, port
        Address to listen on; by default a free port of the loopback interface.
    username, password
        Credentials that every client must give; without them every client is accepted.
    """

    def __init__(
        self,
        host: str = LOOPBACK,
        port: int | None = None,
        *,
        username: str | None = None,
        password: str | None = None,
    ) -> None:
        self.name = "amqtt, the embedded broker"
        self.port = free_port() if port is None else port
        self._host = host
        self._username, self._password = username, password
        self._stopping: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="edgelm-broker", daemon=True)

    def start(self) -> None:
        """Start amqtt. Raises `MissingExtraError` if it is not installed, `EdgelmError` if it cannot listen."""
        try:
            self._module: Any = import_module("edgelm.mqtt.amqtt_broker")
        except ModuleNotFoundError as error:
            raise missing_extra("the embedded broker", "broker", error.name or "amqtt") from error
        for noisy in ("amqtt", "transitions"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        if not is_loopback(self._host):
            if self._username is None:
                problem = "accepts every client: set --username and --password-file, or listen on"
            else:
                problem = "receives passwords unencrypted: use a broker with TLS, such as mosquitto, or listen on"
            log.warning("the embedded broker at %s:%d %s mqtt://%s", self._host, self.port, problem, LOOPBACK)
        self._thread.start()
        self._ready.wait(START_TIMEOUT_S)
        if self._failure is not None:
            raise EdgelmError(f"the embedded broker cannot listen on {self._host}:{self.port}: {self._failure}")

    def stop(self) -> None:
        """Stop the broker and its thread."""
        if self._loop is not None and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  raised by start()
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_log_exception)  # amqtt raises when a client disconnects early
        self._stopping = asyncio.Event()
        config = {
            "listeners": {"default": {"type": "tcp", "bind": f"{self._host}:{self.port}"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }
        broker = self._module.LimitedBroker(config, self._username, self._password)
        await broker.start()
        self._ready.set()
        await self._stopping.wait()
        await broker.shutdown()


def _log_exception(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    log.debug("the embedded broker: %s %r", context.get("message"), context.get("exception"))


def make_local_broker() -> LocalBroker:
    """Return a broker that is not started yet: mosquitto if it is installed, otherwise amqtt."""
    program = find_mosquitto()
    return EmbeddedBroker() if program is None else Mosquitto(program)


def _wait_for_port(host: str, port: int, has_ended: Any) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, port), timeout=1):
                return
        except OSError:
            if has_ended():
                break
            time.sleep(0.02)
    raise EdgelmError(f"nothing listens on {host}:{port}")
