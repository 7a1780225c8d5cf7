"""Settings of the service: flags override EDGELM_* variables, which override a TOML file, which overrides defaults.

Owns the names, defaults and ranges of all settings. Does not know MQTT packets or models.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from edgelm.engine.fairness import ClientLimits
from edgelm.errors import ConfigError
from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl, read_password
from edgelm.system.files import read_toml
from edgelm.validation import FieldError, Length, Range, check, field_types, parse_text, suggest_key, suggest_match

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


_Text = Annotated[str, Length(1, 4096)]
_Texts = Annotated[tuple[_Text, ...], Length(1, 1000)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """All settings of `edgelm serve`. Raises `ConfigError`, which names the setting, if a value is not allowed."""

    mqtt: _Text = "mqtt://localhost:1883"
    model: _Text | _Texts = "builtin"
    """One bundle or several; `models` is always a tuple. The first answers requests that name none."""
    board: _Text = field(default_factory=default_board)
    embedded_broker: bool = False
    username: _Text | None = None
    password_file: _Text | None = None
    cafile: _Text | None = None
    certfile: _Text | None = None
    keyfile: _Text | None = None
    max_batch: Annotated[int, Range(1, 64)] = 4
    """Maximum number of requests that are decoded together."""
    queue: Annotated[int, Range(1, 10_000)] = 8
    """Maximum number of waiting requests."""
    threads: Annotated[int, Range(1, 256)] | None = None
    context: Annotated[int, Range(1, 10_000_000)] | None = None
    prefix_cache_mb: Annotated[int, Range(0, 1_000_000)] = 64
    speculation: bool = True
    cache: bool = True
    """Whether to use the board cache."""
    memory_limit_mb: Annotated[int, Range(1, 10_000_000)] | None = None
    log_format: Literal["text", "json"] = "text"
    max_timeout_s: Annotated[float, Range(0.1, 86_400)] = 300.0
    """Maximum and default time of a request, including the time in the queue."""
    drain_s: Annotated[float, Range(0, 3600)] = 10.0
    """How long running requests may go on after SIGTERM."""
    reply_topics: _Texts = ("reply/#", "+/reply")
    """Topic filters of response topics for clients without a name, in addition to the board's own response topics."""
    client_places: Annotated[int, Range(1, 10_064)] | None = None
    """Maximum number of waiting and running requests of one client; None means half of `queue` + `max_batch`."""
    client_rows: Annotated[int, Range(1, 64)] | None = None
    """Maximum number of requests of one client that are decoded together; None means `max_batch` - 1, at least 1."""
    client_rate: Annotated[float, Range(0.1, 100_000)] = 100.0
    """Requests a second of one client; each 4 KiB of a message count as one more request."""
    client_burst: Annotated[int, Range(1, 100_000)] = 200
    """Requests that one client may send at once."""
    client_sessions: Annotated[int, Range(1, 64)] = 16
    """Maximum number of stored sessions of one client."""
    session_kb: Annotated[int, Range(1, 1_000_000)] = 512
    """Memory of one session's messages and tokens, in kB; at least 24 bytes for each token of the context."""
    sessions_mb: Annotated[int, Range(1, 100_000)] = 16
    """Memory of all sessions of a model, in MB."""
    share_unnamed: bool = False
    """Whether clients without a name may have sessions and share them and cached prefixes."""
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        try:
            check(self)
        except FieldError as error:
            raise ConfigError(str(error)) from error
        check_topic_name("board", self.board)
        if self.password == "":
            raise ConfigError("password must not be empty")
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
    types = field_types(ServeConfig)
    given = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and not name.startswith(OTHER_VARIABLES)
    }
    unknown = sorted(name for name in given if name not in SETTINGS)
    mistyped = {name: given[name] for name in unknown if suggest_match(name, SETTINGS, 0.8)}
    _refuse_unknown(mistyped, set(SETTINGS), "environment EDGELM_*")
    if unknown:  # a cluster sets variables such as EDGELM_SERVICE_PORT for every service, so they are no error
        names = ", ".join(f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in unknown)
        LOG.warning("ignored unknown environment variables: %s", names)
    return {name: parse_text(types[name], value) for name, value in given.items() if name in types}


def _refuse_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{where}: unknown setting {name!r:.60}{suggest_key(name, known)}")
