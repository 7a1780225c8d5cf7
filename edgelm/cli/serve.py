"""`edgelm serve`: answer requests over MQTT until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import time
from contextlib import ExitStack
from typing import Any, Final

from edgelm.cli.flags import add_credential_flags, add_loading_flags
from edgelm.mqtt.local_broker import EmbeddedBroker
from edgelm.mqtt.log_rate_limit import LogRateLimit
from edgelm.mqtt.service_config import SETTINGS, load_config
from edgelm.mqtt.service_setup import open_service
from edgelm.system.terminal import escape_controls, escape_line

DEFAULT_URL: Final = SETTINGS["mqtt"].default
SWITCH_INTERVAL_S: Final = 0.0005
"""Longest time that a thread holds the interpreter lock while another one waits. Python's default is 5 ms: under a
flood of messages, each system call of the publishing thread would then wait that long for paho's thread."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments; each is a setting of `ServeConfig`."""
    parser.epilog = (
        "Every flag is also a key of the TOML file (max_batch = 2) and an environment variable (EDGELM_MAX_BATCH=2); "
        "so are max_timeout_s, drain_s, session_kb, sessions_mb and reply_topics. Flags override variables, variables "
        "override the file."
    )
    parser.add_argument(
        "--mqtt", metavar="URL", nargs="?", const=DEFAULT_URL, help=f"URL of the broker (default: {DEFAULT_URL})"
    )
    parser.add_argument(
        "--model",
        metavar="BUNDLE",
        action="append",
        help="bundle to serve (default: builtin); may be repeated: requests without a model name use the first one",
    )
    parser.add_argument("--board", metavar="NAME", help="name of this board in topics (default: the host's name)")
    parser.add_argument("--config", metavar="FILE", help="TOML file with settings")
    parser.add_argument(
        "--embedded-broker",
        action="store_true",
        default=None,
        help="also run a broker (MQTT 3.1.1) at the URL, for testing; --username and its password apply",
    )
    parser.add_argument("--max-batch", type=int, metavar="N", help="requests decoded together (default: 4)")
    parser.add_argument("--queue", type=int, metavar="N", help="requests that may wait (default: 8)")
    add_loading_flags(parser)
    parser.add_argument(
        "--prefix-cache-mb", type=int, metavar="N", help="size of the prefix cache, 0 disables it (default: 64)"
    )
    parser.add_argument(
        "--no-speculation",
        dest="speculation",
        action="store_false",
        default=None,
        help="disable speculation (draft tokens from earlier text); the answers are the same",
    )
    parser.add_argument(
        "--client-places", type=int, metavar="N", help="open requests of one client (default: half of queue and batch)"
    )
    parser.add_argument(
        "--client-rows",
        type=int,
        metavar="N",
        help="requests of one client decoded together (default: --max-batch minus 1)",
    )
    parser.add_argument(
        "--client-rate",
        type=float,
        metavar="N",
        help="requests per second of one client; each 4 KiB count as one more (default: 100)",
    )
    parser.add_argument("--client-burst", type=int, metavar="N", help="burst of --client-rate (default: 200)")
    parser.add_argument("--client-sessions", type=int, metavar="N", help="sessions kept of one client (default: 16)")
    parser.add_argument(
        "--share-unnamed",
        action="store_true",
        default=None,
        help="clients without a name share sessions and the prefix cache (default: they have none)",
    )
    parser.add_argument("--log-format", choices=("text", "json"), help="format of log lines (default: text)")
    add_credential_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    flags = {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}
    flags["model"] = tuple(args.model) if args.model else None
    config = load_config(args.config, None, flags)
    _configure_logging(config.log_format)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    broker = config.broker
    with ExitStack() as stack:
        if config.embedded_broker:
            stack.enter_context(
                EmbeddedBroker(broker.url.host, broker.url.port, username=broker.user, password=broker.password)
            )
        else:
            broker.warn_if_unencrypted()
        service = stack.enter_context(open_service(config))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: service.stop())
        service.run()
    return 0


def _configure_logging(form: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if form == "json" else _TextLines("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(LogRateLimit(handler))
    root = logging.getLogger("edgelm")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False


class _TextLines(logging.Formatter):
    """One line per message, with a client's control characters escaped; a traceback follows on its own lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  name given by logging
        record.message = escape_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


class _JsonLines(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": escape_controls(record.getMessage()),
        }
        if record.exc_info:
            line["trace"] = escape_controls(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)
