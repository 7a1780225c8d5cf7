"""Settings of the service: flags override EDGELM_* variables, which override a TOML file, which overrides defaults.

Owns the names, defaults and ranges of all settings. Does not know MQTT packets or models.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edgelm.engine.fairness import ClientLimits
from edgelm.errors import ConfigError
from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl, read_password
from edgelm.system.files import read_toml

LOG: Final = logging.getLogger(__name__)

NAME_PATTERN: Final = re.compile(r"[a-z0-9_-]{1,32}")
"""Allowed names of boards and clients; the whole name must match."""

RESERVED_NAMES: Final = frozenset({"pool", "client"})
"""Topic levels with another meaning, not allowed as names."""

ENVIRONMENT_PREFIX: Final = "EDGELM_"
OTHER_VARIABLES: Final = ("EDGELM_CACHE_", "EDGELM_DATA_DIR", "EDGELM_SHARED", "EDGELM_TEST_")
"""Prefixes of variables that are not settings of the service: other parts of edgelm and the tests read them."""


def default_board() -> str:
    """Return the host name, changed to an allowed board name."""
    name = re.sub(r"[^a-z0-9_-]+", "-", socket.gethostname().split(".")[0].lower()).strip("-")[:32]
    return name if name and name not in RESERVED_NAMES else "board"


def check_topic_name(what: str, name: str) -> None:
    """Raise `ConfigError` unless `name` is allowed as a name in topics. `what` starts the message."""
    if not NAME_PATTERN.fullmatch(name) or name in RESERVED_NAMES:
        raise ConfigError(
            f"{what}: {name!r} is not allowed; use 1 to 32 of a-z 0-9 _ - and neither "
            + " nor ".join(sorted(RESERVED_NAMES))
        )


def _setting(default: Any, kind: type | str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"kind": kind, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """All settings of `edgelm serve`. Raises `ConfigError`, which names the setting, if a value is not allowed."""

    mqtt: str = _setting("mqtt://localhost:1883", str)
    model: str | tuple[str, ...] = _setting("builtin", "names")
    """One bundle or several; `models` is always a tuple. The first answers requests that name none."""
    board: str = field(default_factory=default_board, metadata={"kind": str})
    embedded_broker: bool = _setting(False, bool)
    username: str | None = _setting(None, str)
    password_file: str | None = _setting(None, str)
    cafile: str | None = _setting(None, str)
    certfile: str | None = _setting(None, str)
    keyfile: str | None = _setting(None, str)
    max_batch: int = _setting(4, int, 1, 64)
    """Maximum number of requests that are decoded together."""
    queue: int = _setting(8, int, 1, 10_000)
    """Maximum number of waiting requests."""
    threads: int | None = _setting(None, int, 1, 256)
    context: int | None = _setting(None, int, 1, 10_000_000)
    prefix_cache_mb: int = _setting(64, int, 0, 1_000_000)
    speculation: bool = _setting(True, bool)
    cache: bool = _setting(True, bool)
    """Whether to use the board cache."""
    memory_limit_mb: int | None = _setting(None, int, 1, 10_000_000)
    log_format: str = _setting("text", str)
    max_timeout_s: float = _setting(300.0, float, 0.1, 86_400)
    """Maximum and default time of a request, including the time in the queue."""
    drain_s: float = _setting(10.0, float, 0, 3600)
    """How long running requests may go on after SIGTERM."""
    reply_topics: tuple[str, ...] = _setting(("reply/#", "+/reply"), tuple)
    """Topic filters of response topics for clients without a name, in addition to the board's own response topics."""
    client_places: int | None = _setting(None, int, 1, 10_064)
    """Maximum number of waiting and running requests of one client; None means half of `queue` + `max_batch`."""
    client_rows: int | None = _setting(None, int, 1, 64)
    """Maximum number of requests of one client that are decoded together; None means `max_batch` - 1, at least 1."""
    client_rate: float = _setting(100.0, float, 0.1, 100_000)
    """Requests a second of one client; each 4 KiB of a message count as one more request."""
    client_burst: int = _setting(200, int, 1, 100_000)
    """Requests that one client may send at once."""
    client_sessions: int = _setting(16, int, 1, 64)
    """Maximum number of stored sessions of one client."""
    session_kb: int = _setting(512, int, 1, 1_000_000)
    """Memory of one session's messages and tokens, in kB; at least 24 bytes for each token of the context."""
    sessions_mb: int = _setting(16, int, 1, 100_000)
    """Memory of all sessions of a model, in MB."""
    share_unnamed: bool = _setting(False, bool)
    """Whether clients without a name may have sessions and share them and cached prefixes."""
    password: str | None = field(default=None, repr=False, metadata={"kind": str})

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            _check(setting, getattr(self, setting.name))
        check_topic_name("board", self.board)
        if self.log_format not in {"text", "json"}:
            raise ConfigError(f"log_format: {self.log_format!r} is not allowed; use text or json")
        if self.password and self.password_file:
            raise ConfigError("password_file: EDGELM_PASSWORD is also set; use only one of the two")
        url = BrokerUrl.parse(self.mqtt)
        if self.embedded_broker and url.scheme != "mqtt":
            raise ConfigError(f"embedded_broker: supports only mqtt:// URLs, not {url.scheme}://")
        user = self.username or url.username
        if self.embedded_broker and user and not (self.password or self.password_file):
            raise ConfigError(
                f"embedded_broker: the user name {user!r} needs a password that clients must give; use --password-file"
            )

    @property
    def models(self) -> tuple[str, ...]:
        """The served bundles, in order."""
        return (self.model,) if isinstance(self.model, str) else self.model

    @property
    def max_client_requests(self) -> int:
        """Maximum number of waiting and running requests of one client."""
        return max(1, (self.queue + self.max_batch) // 2) if self.client_places is None else self.client_places

    @property
    def client_limits(self) -> ClientLimits:
        """Limits of one client in an engine."""
        return ClientLimits(
            rows=max(1, self.max_batch - 1) if self.client_rows is None else self.client_rows,
            sessions=self.client_sessions,
            session_bytes=self.session_kb * 1000,
            all_sessions_bytes=self.sessions_mb * 1_000_000,
        )

    @property
    def broker(self) -> BrokerConfig:
        """Broker URL and credentials. Reads the password file; raises `ConfigError` if it cannot be used."""
        return BrokerConfig(
            url=BrokerUrl.parse(self.mqtt),
            username=self.username,
            password=read_password(self.password_file) if self.password_file else self.password,
            cafile=self.cafile,
            certfile=self.certfile,
            keyfile=self.keyfile,
        )


SETTINGS: Final = {setting.name: setting for setting in dataclasses.fields(ServeConfig)}


def _check(setting: dataclasses.Field[Any], value: Any) -> None:
    """Raise `ConfigError` if a value has the wrong type or is out of range."""
    if value is None and setting.default is None:
        return
    kind, name = setting.metadata["kind"], setting.name
    if kind == "names" and isinstance(value, str):
        kind = str
    if kind in (tuple, "names"):
        if not isinstance(value, tuple) or not value or not all(isinstance(item, str) and item for item in value):
            raise ConfigError(f"{name}: must be a list of non-empty strings")
        return
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
        raise ConfigError(f"{name}: must be {words[kind]}, got {value!r}")
    if kind is str and not value:
        raise ConfigError(f"{name}: must not be empty")
    low, high = setting.metadata.get("low"), setting.metadata.get("high")
    if low is not None and high is not None and not low <= value <= high:
        raise ConfigError(f"{name}: must be in [{low}, {high}], got {value}")


def load_config(
    file: str | Path | None, environment: Mapping[str, str] | None, flags: Mapping[str, Any]
) -> ServeConfig:
    """Return the settings from all sources.

    Parameters
    ----------
    file
        A TOML file of settings, or None.
    environment
        Variables `EDGELM_<SETTING>`; None means `os.environ`.
    flags
        Settings given on the command line; None values are ignored.

    Raises
    ------
    ConfigError
        For an unknown key, a wrong type, or a value out of range; the message names the key.
    """
    settings = _from_file(Path(file)) if file is not None else {}
    settings |= _from_environment(os.environ if environment is None else environment)
    settings |= {name: value for name, value in flags.items() if value is not None}
    return ServeConfig(**settings)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        settings = read_toml(path)
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"config: {path} is not TOML: {error}") from error
    if "password" in settings:
        raise ConfigError(
            f"{path}: password: not allowed here; write it to another file (mode 0600) and set password_file"
        )
    _refuse_unknown(settings, set(SETTINGS) - {"password"}, str(path))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    given = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and not name.startswith(OTHER_VARIABLES)
    }
    unknown = sorted(name for name in given if name not in SETTINGS)
    mistyped = {name: given[name] for name in unknown if difflib.get_close_matches(name, SETTINGS, 1, 0.8)}
    _refuse_unknown(mistyped, set(SETTINGS), "environment EDGELM_*")
    if unknown:  # a cluster sets variables such as EDGELM_SERVICE_PORT for every service, so they are no error
        names = ", ".join(f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in unknown)
        LOG.warning("ignored unknown environment variables: %s", names)
    return {name: _convert(name, value) for name, value in given.items() if name in SETTINGS}


def _refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: unknown setting {name!r}; known are {', '.join(sorted(known))}")


def _convert(name: str, text: str) -> Any:
    """Convert the text of an environment variable to the type of its setting."""
    kind = SETTINGS[name].metadata["kind"]
    if kind == "names" and "," not in text:
        return text
    if kind in (tuple, "names"):
        return tuple(item.strip() for item in text.split(","))
    if kind is bool:
        words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
        if text.lower() not in words:
            raise ConfigError(f"{name}: must be true or false, got {text!r}")
        return words[text.lower()]
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {text!r} is not {'a whole number' if kind is int else 'a number'}") from error
