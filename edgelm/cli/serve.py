"""`edgelm serve`: a bundle answers over MQTT until it is told to stop."""

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
"""How long a thread may hold the interpreter while another waits. With Python's 5 ms, under a flood paho's thread would
hold it so long each time that another one has let go of it for a system call, as it does to publish."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments; each is a setting of `ServeConfig`."""
    parser.epilog = (
        "Every flag is also a key of the TOML file (max_batch = 2) and a variable (EDGELM_MAX_BATCH=2); so are "
        "max_timeout_s, drain_s, session_kb, sessions_mb and reply_topics. A flag wins over a variable, a variable "
        "over the file."
    )
    parser.add_argument(
        "--mqtt", metavar="URL", nargs="?", const=DEFAULT_URL, help=f"where the broker is ({DEFAULT_URL})"
    )
    parser.add_argument(
        "--model",
        metavar="BUNDLE",
        action="append",
        help="what to serve (builtin); may be repeated: the first answers requests that name no model",
    )
    parser.add_argument("--board", metavar="NAME", help="this board's name in topics (the host's name)")
    parser.add_argument("--config", metavar="FILE", help="a TOML file of settings")
    parser.add_argument(
        "--embedded-broker",
        action="store_true",
        default=None,
        help="be the broker too (MQTT 3.1.1), at the URL, for trying out; asks clients for --username and the password",
    )
    parser.add_argument("--max-batch", type=int, metavar="N", help="requests decoded together (4)")
    parser.add_argument("--queue", type=int, metavar="N", help="requests that may wait (8)")
    add_loading_flags(parser)
    parser.add_argument(
        "--prefix-cache-mb", type=int, metavar="N", help="memory of earlier prompts and answers, 0 for none (64)"
    )
    parser.add_argument(
        "--no-speculation",
        dest="speculation",
        action="store_false",
        default=None,
        help="never guess tokens from earlier text; answers are the same either way",
    )
    parser.add_argument(
        "--client-places", type=int, metavar="N", help="requests one client may have here (half of queue and batch)"
    )
    parser.add_argument(
        "--client-rows", type=int, metavar="N", help="of these, decoded together (all but one of --max-batch)"
    )
    parser.add_argument(
        "--client-rate", type=float, metavar="N", help="requests a second of one client, 4 KiB count as one more (100)"
    )
    parser.add_argument("--client-burst", type=int, metavar="N", help="how many of them may come at once (200)")
    parser.add_argument("--client-sessions", type=int, metavar="N", help="sessions of one client that are kept (16)")
    parser.add_argument(
        "--share-unnamed",
        action="store_true",
        default=None,
        help="clients without a name share sessions and earlier prompts (they have none)",
    )
    parser.add_argument("--log-format", choices=("text", "json"), help="how to log (text)")
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
    """One line a message, whatever a client put into it; a traceback stands below."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the library's name
        record.message = escape_line(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record))


class _JsonLines(logging.Formatter):
    """One JSON object a line."""

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
