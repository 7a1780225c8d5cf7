"""The command line: chooses one sub-command, imports it alone, and turns errors into one line and an exit code.

Each command is one module `edgelm.cli.<name>` with `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from edgelm._version import __version__
from edgelm.errors import EdgelmError, UsageError

COMMANDS: Final[dict[str, str]] = {
    "demo": "start a broker, serve the built-in model, ask it three things, stop",
    "export": "turn a Hugging Face checkpoint into a quantized ONNX bundle",
    "info": "show what a bundle is: manifest, sizes, quality, memory",
    "generate": "answer one prompt",
    "chat": "hold a conversation",
    "serve": "answer over MQTT",
    "ask": "ask a board over MQTT",
    "bench": "measure a bundle on this machine",
    "eval": "measure a bundle's quality on text or tasks",
    "distill": "train a small student, with or without a teacher",
    "devices": "know, check and emulate boards",
}

EPILOG: Final = """\
Wherever a BUNDLE is expected, `builtin` names the one inside the package.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else 2
    try:
        return int(args.run(args))
    except UsageError as error:
        print(f"edgelm {args.command}: {error} (edgelm {args.command} --help)", file=sys.stderr)
        return 2
    except EdgelmError as error:
        if args.debug:
            traceback.print_exc()
        print(f"edgelm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"edgelm {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:  # noqa: BLE001  a bug of ours: still one line, the trace with --debug
        if args.debug:
            traceback.print_exc()
        print(
            f"edgelm {args.command}: internal error: {type(error).__name__}: {error} (--debug shows where)",
            file=sys.stderr,
        )
        return 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Import the chosen command alone, so that `edgelm --help` stays instant."""
    parser = argparse.ArgumentParser(
        prog="edgelm",
        description="Small language models on a board: distil, quantize, export, serve over MQTT.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edgelm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        if name == chosen:
            module = import_module(f"edgelm.cli.{name}")
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
            command.set_defaults(run=module.run)
    return parser.parse_args(arguments)
