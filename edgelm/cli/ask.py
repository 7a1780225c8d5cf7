"""`edgelm ask`: send one prompt to a board over MQTT and print the answer as it arrives."""

from __future__ import annotations

import argparse
import getpass
import os
import re
import sys
import uuid
from typing import Final

from edgelm.cli.flags import (
    add_credential_flags,
    add_raw_flag,
    add_sampling_flags,
    add_template_flags,
    broker_from,
    read_prompt,
    sampling_from,
    template_from,
)
from edgelm.cli.tables import explain_truncation
from edgelm.errors import EdgelmError, UsageError
from edgelm.mqtt import request_codec, response_codec
from edgelm.mqtt.request_client import RequestClient, run_request
from edgelm.mqtt.service_config import check_topic_name, default_board
from edgelm.mqtt.topics import is_name

TIMEOUT_S: Final = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    url = os.environ.get("EDGELM_MQTT", "mqtt://localhost:1883")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; - reads it from standard input")
    parser.add_argument("--broker", metavar="URL", default=url, help="URL of the broker (default: %(default)s)")
    parser.add_argument(
        "--board", metavar="NAME", help="name of the board (default: EDGELM_BOARD, else this host's name)"
    )
    parser.add_argument("--model", metavar="NAME", help="model of the board that answers (default: its first one)")
    parser.add_argument("--session", metavar="NAME", help="continue this conversation, or start it")
    parser.add_argument(
        "--client",
        metavar="NAME",
        help="name of this client (default: the broker's user; with --session and no such user, this system's user)",
    )
    parser.add_argument(
        "--end-session",
        action="store_true",
        default=None,
        help="end the session after this answer; without PROMPT, immediately",
    )
    parser.add_argument("--no-stream", action="store_true", help="print the answer only when it is complete")
    parser.add_argument("--json", action="store_true", help="print only the final message, as JSON")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="S",
        default=TIMEOUT_S,
        help="seconds to wait for the answer (default: %(default)g)",
    )
    add_credential_flags(parser)
    add_raw_flag(parser)
    add_template_flags(parser)
    add_sampling_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Send the request and print the answer. Raises `EdgelmError` if the final message reports an error."""
    board = args.board or os.environ.get("EDGELM_BOARD") or default_board()
    check_topic_name("--board", board)
    if args.end_session and args.session is None:
        raise UsageError("--end-session needs --session NAME")
    if args.prompt is None and not args.end_session:
        raise UsageError("give a PROMPT, or --session NAME --end-session")
    if args.client is not None:
        check_topic_name("--client", args.client)
    options = {"model": args.model, "session": args.session, "end_session": args.end_session}
    request = make_request(
        None if args.prompt is None else read_prompt(args.prompt),
        stream=not (args.no_stream or args.json),
        timeout_s=args.timeout,
        **{key: value for key, value in options.items() if value is not None},
        **sampling_from(args),
        **template_from(args),
    )
    shown: list[str] = []

    def show(delta: str) -> None:
        print(delta, end="", flush=True)
        shown.append(delta)

    broker = broker_from(args)
    broker.warn_if_unencrypted()
    client = args.client
    if client is None and args.session is not None and not is_name(broker.user or ""):
        client = _default_client_name()
    with RequestClient(broker, board, client) as request_client:
        try:
            final = run_request(request_client, request, show if request.stream else None)
        except BaseException:
            if shown:
                print()  # print the error on a line of its own
            raise
    if args.json:
        print(response_codec.write_final_message(final).decode())
    elif args.prompt is not None and (final.error is None or final.completion.text):
        print("" if request.stream else final.completion.text)
    truncation = None if args.json or final.error is not None else explain_truncation(final.completion)
    if truncation is not None:
        print(f"edgelm ask: {truncation}", file=sys.stderr)
    if final.error is not None:
        raise EdgelmError(f"{final.error.code}: {final.error.message}{_retry_hint(final.error.retry_after_s)}")
    return 0


def make_request(prompt: str | None, **keys: object) -> request_codec.GenerateRequest:
    """Return a request. Raises `RequestError`, which names the key, if the board would refuse it."""
    body = {**({} if prompt is None else {"prompt": prompt}), **keys}
    return request_codec.parse_request(request_codec.Envelope(uuid.uuid4().hex[:16], None, None, body))


def _default_client_name() -> str:
    """Return a client name made of the system user's name: sessions belong to a named client."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no passwd entry, and no variable names one
        user = ""
    name = re.sub(r"[^a-z0-9_-]+", "-", user.lower()).strip("-")[:28]
    return f"ask-{name}" if name else "ask"


def _retry_hint(seconds: float | None) -> str:
    return "" if seconds is None else f" (try again in {seconds:g} s)"
