"""`edgelm chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

import edgelm
from edgelm.cli.flags import (
    add_loading_flags,
    add_sampling_flags,
    add_template_flags,
    loading_from,
    sampling_from,
    template_from,
)
from edgelm.errors import EdgelmError, RequestError
from edgelm.model import Model

SESSION: Final = "chat"
"""The session's name: the model remembers what was said."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "Ctrl-C stops an answer, Ctrl-D or /exit ends the chat, /clear forgets what was said."
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory, or builtin")
    add_template_flags(parser)
    add_sampling_flags(parser)
    add_loading_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Read a line, answer it, until the end of input."""
    given = {**sampling_from(args), **template_from(args)}
    with edgelm.load(args.bundle, **loading_from(args), max_batch=1) as model:
        if model.manifest.chat_template is None:
            raise EdgelmError(f"{args.bundle} has no chat template; `edgelm generate` continues plain text")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print()
                continue
            if line == "/exit":
                return 0
            if line == "/clear":
                model.end_session(SESSION)
            elif line:
                _turn(model, [{"role": "user", "content": line}], given)


def _turn(model: Model, messages: list[dict[str, str]], given: dict[str, Any]) -> None:
    """Answer what is new; where it cannot be answered, the conversation stays as it was."""
    stream = model.stream(messages=messages, session=SESSION, **given)
    try:
        for chunk in stream:
            print(chunk.delta, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except RequestError as error:
        print(f"edgelm chat: {error}; /clear starts anew", file=sys.stderr)
        return
    finally:
        stream.close()  # type: ignore[attr-defined]
    print()
