"""Broker URL and credentials. Owns the syntax of a broker URL. Does not know MQTT packets."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from edgelm.errors import ConfigError

LOG: Final = logging.getLogger(__name__)

DEFAULT_PORTS: Final[dict[str, int]] = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443, "unix": 0}


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """The address of a broker. For a Unix socket `host` is its path and `port` is 0."""

    scheme: str
    host: str
    port: int
    path: str = ""
    """The path of the web socket."""
    username: str | None = None

    @classmethod
    def parse(cls, text: str) -> BrokerUrl:
        """Parse a URL with one of the schemes in `DEFAULT_PORTS`. Raises `ConfigError` if it is not valid."""
        try:
            parts = urlsplit(text)
            port, host = parts.port, parts.hostname or ""
            host.encode("idna")
        except ValueError:  # its text may contain a part of a password, so it is not shown
            raise ConfigError(
                f"broker URL {_redact(text)!r}: write scheme://host or scheme://host:port, the port from 1 to 65535"
            ) from None
        if parts.scheme not in DEFAULT_PORTS:
            raise ConfigError(
                f"broker URL {_redact(text)!r}: must start with one of "
                + ", ".join(f"{scheme}://" for scheme in DEFAULT_PORTS)
            )
        if parts.password is not None:
            raise ConfigError(
                "broker URL: must not contain a password, which the list of processes would show; "
                "use --password-file or EDGELM_PASSWORD"
            )
        user = unquote(parts.username) if parts.username else None
        if parts.scheme == "unix":
            if not parts.path:
                raise ConfigError(f"broker URL {text!r}: needs the socket's path, as in unix:///run/mosquitto.sock")
            return cls("unix", unquote(parts.path), 0, username=user)
        if not host or port == 0 or parts.query or parts.fragment:
            raise ConfigError(f"broker URL {text!r}: write scheme://host or scheme://host:port")
        if parts.path not in {"", "/"} and parts.scheme not in {"ws", "wss"}:
            raise ConfigError(f"broker URL {text!r}: a path is not allowed with {parts.scheme}://")
        return cls(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme], parts.path, user)

    @property
    def is_encrypted(self) -> bool:
        """Whether the connection uses TLS."""
        return self.scheme in {"mqtts", "wss"}

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix://{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is of this machine. Names are not resolved."""
    if host.lower().rstrip(".") == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _redact(text: str) -> str:
    """Return a URL, valid or not, without the part between the scheme and its last @."""
    return re.sub(r"^([a-z]+://)?.*@", r"\1...@", text, flags=re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """Broker URL and credentials. `repr` does not show the password."""

    url: BrokerUrl
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None

    def __post_init__(self) -> None:
        if self.keyfile and not self.certfile:
            raise ConfigError("keyfile: needs certfile too")
        if (self.cafile or self.certfile) and not self.url.is_encrypted:
            raise ConfigError(f"cafile, certfile: {self.url} is not encrypted; use mqtts:// or wss://")
        for name in ("cafile", "certfile", "keyfile"):
            path = getattr(self, name)
            if path and not Path(path).is_file():
                raise ConfigError(f"{name}: {path} is not a file")
        if self.certfile:  # without a key file, the certificate file also contains the key
            name, path = ("keyfile", self.keyfile) if self.keyfile else ("certfile with the key", self.certfile)
            _check_secret_file(name, Path(path))
        if self.password and not (self.username or self.url.username):
            raise ConfigError("a password needs a user name: --username NAME")

    @property
    def user(self) -> str | None:
        """The user name, from `username` or the URL."""
        return self.username or self.url.username

    def warn_if_unencrypted(self) -> None:
        """Log a warning if the password is sent over a network without encryption."""
        url = self.url
        if self.password and not url.is_encrypted and url.scheme != "unix" and not is_loopback(url.host):
            LOG.warning(
                "the password is sent to %s without encryption: use %s:// (and --cafile FILE if your own CA signed the"
                " broker's certificate)",
                url,
                {"mqtt": "mqtts", "ws": "wss"}[url.scheme],
            )


def read_password(path: str) -> str:
    """Return the first line of a password file. Raises `ConfigError` if other users can read or change it."""
    file = Path(path)
    try:
        _check_secret_file("password_file", file)
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"password_file: cannot read {path}: {reason}") from error
    if not lines or not lines[0]:
        raise ConfigError(f"password_file: {path} is empty")
    return lines[0]


def _check_secret_file(what: str, file: Path) -> None:
    """Raise `ConfigError` if other users can read or change the file, `OSError` if there is no file."""
    status = file.stat()
    mode = status.st_mode & 0o777
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"{what}: {file} belongs to another user (uid {status.st_uid}), who can change it")
    if mode & 0o077:
        raise ConfigError(f"{what}: other users can access {file} (mode {mode:04o}); run: chmod 600 {file}")
