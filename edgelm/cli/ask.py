"""`edgelm request`: one prompt to a board over MQTT, its answer as it comes."""

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
    """Declare the command's arguments."""
    url = os.environ.get("EDGELM_MQTT", "mqtt://localhost:1883")
    board = os.environ.get("EDGELM_BOARD") or default_board()
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; - reads it from standard input")
    parser.add_argument("--broker", metavar="URL", default=url, help="where the broker is (%(default)s)")
    parser.add_argument("--board", metavar="NAME", default=board, help="whom to ask (%(default)s)")
    parser.add_argument("--model", metavar="NAME", help="which of the board's models is to answer (its first)")
    parser.add_argument("--session", metavar="NAME", help="go on with this conversation, or begin it")
    parser.add_argument(
        "--client", metavar="NAME", help="who asks (the broker's user; with --session else this system's user)"
    )
    parser.add_argument(
        "--end-session", action="store_true", default=None, help="forget it after this; without PROMPT, at once"
    )
    parser.add_argument("--no-stream", action="store_true", help="print the answer when it is complete")
    parser.add_argument("--json", action="store_true", help="print the final message and nothing else")
    parser.add_argument(
        "--timeout", type=float, metavar="S", default=TIMEOUT_S, help="seconds for the answer (%(default)g)"
    )
    add_credential_flags(parser)
    add_raw_flag(parser)
    add_template_flags(parser)
    add_sampling_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Ask, print, and fail where no whole answer came."""
    check_topic_name("--board", args.board)
    if args.end_session and args.session is None:
        raise UsageError("--end-session needs --session NAME")
    if args.prompt is None and not args.end_session:
        raise UsageError("give a PROMPT, or --session NAME --end-session")
    if args.client is not None:
        check_topic_name("--client", args.client)
    whom = {"model": args.model, "session": args.session, "end_session": args.end_session}
    request = make_request(
        None if args.prompt is None else read_prompt(args.prompt),
        stream=not (args.no_stream or args.json),
        timeout_s=args.timeout,
        **{key: value for key, value in whom.items() if value is not None},
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
    with RequestClient(broker, args.board, client) as request_client:
        try:
            final = run_request(request_client, request, show if request.stream else None)
        except BaseException:
            if shown:
                print()  # the error stands on a line of its own
            raise
    if args.json:
        print(response_codec.write_final_message(final).decode())
    elif args.prompt is not None and (final.error is None or final.completion.text):
        print("" if request.stream else final.completion.text)
    told = None if args.json or final.error is not None else explain_truncation(final.completion)
    if told is not None:
        print(f"edgelm ask: {told}", file=sys.stderr)
    if final.error is not None:
        raise EdgelmError(f"{final.error.code}: {final.error.message}{_retry_hint(final.error.retry_after_s)}")
    return 0


def make_request(prompt: str | None, **keys: object) -> request_codec.GenerateRequest:
    """Return a request; raise `RequestError`, which names the key, where the board would refuse it."""
    asked = {} if prompt is None else {"prompt": prompt}
    return request_codec.parse_request(request_codec.Envelope(uuid.uuid4().hex[:16], None, None, {**asked, **keys}))


def _default_client_name() -> str:
    """Return a name for whoever runs this, the same every time: a session is a named client's."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no passwd entry, and no variable names one
        user = ""
    name = re.sub(r"[^a-z0-9_-]+", "-", user.lower()).strip("-")[:28]
    return f"ask-{name}" if name else "ask"


def _retry_hint(seconds: float | None) -> str:
    return "" if seconds is None else f" (try again in {seconds:g} s)"
