"""Brokers that this process starts and ends itself: mosquitto where it is installed, else amqtt inside."""

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
START_WITHIN_S: Final = 10.0
STOP_WITHIN_S: Final = 5.0


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def find_mosquitto() -> str | None:
    """Return the path of mosquitto, which Debian puts where only root looks."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin")


class LocalBroker(ABC):
    """A broker on the loopback interface for as long as the `with` block runs; anyone on this machine may use it."""

    name: str
    port: int

    @property
    def url(self) -> str:
        """Where it listens."""
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
        """Start, and return when it accepts connections."""

    @abstractmethod
    def stop(self) -> None:
        """End it, and return when it is gone."""


class Mosquitto(LocalBroker):
    """mosquitto with a configuration of its own, on a free port."""

    def __init__(self, program: str) -> None:
        self.name = "mosquitto"
        self.port = free_port()
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start mosquitto; raise `EdgelmError` with what it said when it ends at once."""
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
                start_new_session=True,  # Ctrl-C is for us; we end it when the goodbyes are said
            )
        try:
            _wait_for_port(LOOPBACK, self.port, lambda: self._process is None or self._process.poll() is not None)
        except BaseException as error:
            said = log_file.read_text("utf-8", "replace").strip().splitlines()
            self.stop()
            if isinstance(error, EdgelmError) and said:
                raise EdgelmError(f"mosquitto did not start: {said[-1]}") from error
            raise

    def stop(self) -> None:
        """End mosquitto by its process id."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class EmbeddedBroker(LocalBroker):
    """amqtt on a thread of its own: MQTT 3.1.1 only, nothing kept, for trying things out. Its limits: `mqtt.embedded`.

    Parameters
    ----------
    host, port
        Where to listen; by default a free port of the loopback interface.
    username, password
        What every client must give; without them everyone who reaches the port is let in.
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
        """Start amqtt; raise `MissingExtraError` where it is not installed, `EdgelmError` where it cannot listen."""
        try:
            self._module: Any = import_module("edgelm.mqtt.amqtt_broker")
        except ModuleNotFoundError as error:
            raise missing_extra("the embedded broker", "broker", error.name or "amqtt") from error
        for noisy in ("amqtt", "transitions"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        if not is_loopback(self._host):
            if self._username is None:
                problem = "lets everyone in who reaches it: give --username and --password-file, or listen on"
            else:
                problem = "is given passwords unencrypted: use a broker with TLS, such as mosquitto, or listen on"
            log.warning("the embedded broker at %s:%d %s mqtt://%s", self._host, self.port, problem, LOOPBACK)
        self._thread.start()
        self._ready.wait(START_WITHIN_S)
        if self._failure is not None:
            raise EdgelmError(f"the embedded broker cannot listen on {self._host}:{self.port}: {self._failure}")

    def stop(self) -> None:
        """End the broker and its thread."""
        if self._loop is not None and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        if self._thread.is_alive():
            self._thread.join(STOP_WITHIN_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001  told to whoever waits in start()
            self._failure = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(_note)  # amqtt stumbles over clients that leave early
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


def _note(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    log.debug("the embedded broker: %s %r", context.get("message"), context.get("exception"))


def make_local_broker() -> LocalBroker:
    """Return a broker for a demonstration, not started yet: mosquitto where it is installed, else amqtt."""
    program = find_mosquitto()
    return EmbeddedBroker() if program is None else Mosquitto(program)


def _wait_for_port(host: str, port: int, has_ended: Any) -> None:
    until = time.monotonic() + START_WITHIN_S
    while time.monotonic() < until:
        try:
            with socket.create_connection((host, port), timeout=1):
                return
        except OSError:
            if has_ended():
                break
            time.sleep(0.02)
    raise EdgelmError(f"nothing listens on {host}:{port}")
