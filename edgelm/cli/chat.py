"""`edgelm chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import edgelm
from edgelm.cli.flags import add_loading_flags, add_sampling_flags, loading_from, sampling_from
from edgelm.errors import EdgelmError, RequestError
from edgelm.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = "Ctrl-C stops an answer, Ctrl-D or /exit ends the chat, /clear forgets what was said."
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory, or builtin")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    add_sampling_flags(parser)
    add_loading_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Read a line, answer it, until the end of input."""
    given = sampling_from(args)
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
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
                messages = list(opening)
            elif line:
                messages = _turn(model, messages, line, given)


def _turn(model: Model, messages: list[dict[str, str]], line: str, given: dict[str, Any]) -> list[dict[str, str]]:
    """Answer one line; return the conversation with both sides, or as it was when the line cannot be answered."""
    asked = [*messages, {"role": "user", "content": line}]
    said = ""
    stream = model.stream(messages=asked, **given)
    try:
        for chunk in stream:
            said += chunk.delta
            print(chunk.delta, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except RequestError as error:
        print(f"edgelm chat: {error}; /clear starts anew", file=sys.stderr)
        return messages
    finally:
        stream.close()  # type: ignore[attr-defined]
    print()
    return [*asked, {"role": "assistant", "content": said}]
