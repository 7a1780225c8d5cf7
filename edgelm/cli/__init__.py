"""The command line: imports only the chosen sub-command, and turns errors into one line and an exit code.

A command is a module `edgelm.cli.<name>` (exceptions: `MODULES`) with `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import traceback
from collections.abc import Container, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Final, NoReturn

from edgelm._version import __version__
from edgelm.errors import EdgelmError, UsageError
from edgelm.system.terminal import escape_output

COMMANDS: Final[dict[str, str]] = {
    "demo": "start a broker, serve the built-in model, send it three requests, stop",
    "models": "list the models that can be pulled by name",
    "pull": "download a model by name and convert it for this board",
    "list": "list the models on this machine",
    "show": "show the details of a model",
    "rm": "remove models",
    "export": "convert a checkpoint (Hugging Face, GGUF, Ollama) to a quantized ONNX bundle",
    "prefix": "precompute the common beginning of prompts and store it in a bundle",
    "info": "show the manifest, sizes, quality and memory of a bundle",
    "generate": "answer one prompt",
    "chat": "chat with a model in the terminal",
    "serve": "answer requests over MQTT",
    "ask": "send a request to a board over MQTT",
    "bench": "measure the speed of a bundle on this machine",
    "cache": "show or clear the board cache",
    "eval": "measure the quality of a bundle on text or tasks",
    "distill": "train a small student model, with or without a teacher",
    "devices": "list, detect, test and emulate boards",
    "completion": "print a completion script for a shell",
}

MODULES: Final = {"list": "listing"}
"""Modules whose name differs from their command: a module named `list` would hide the built-in type in this package."""

ANSWERING: Final = frozenset({"generate", "chat", "ask"})
"""Commands that print a model's answer: its characters are written unchanged to a pipe."""

EPILOG: Final = """\
A BUNDLE is a directory written by `edgelm export`, a name shown by `edgelm list`, or `builtin` (the model inside the
package).
Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors; `main` prints each in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`, with the closest valid choice if there is one."""
        wrong = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
        raise UsageError(message + (_suggest(wrong[1], re.findall(r"[\w.-]+", wrong[2]), 0.8) if wrong else ""))

    def options(self) -> set[str]:
        """Return the flags of this parser and of its sub-commands."""
        below = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
        found = {flag for action in self._actions for flag in action.option_strings}
        return found.union(*(parser.options() for action in below for parser in action.choices.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = _chosen(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a terminal without the character shows its code
    with escape_output(raw_stdout=chosen in ANSWERING or "--json" in arguments):
        return _run(arguments, chosen)


def _run(arguments: list[str], chosen: str) -> int:
    try:
        args = _parse(arguments, chosen)
        return int(args.run(args))
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # the reader of the output closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  every error is printed in one line
        if "--debug" in arguments:
            traceback.print_exc()
        code, reason = _explain(error, f"edgelm {chosen}")
        print(f"edgelm {chosen}: {' '.join(reason.split())}" if chosen else f"edgelm: {reason}", file=sys.stderr)
        return code


def _explain(error: BaseException, command: str) -> tuple[int, str]:
    """Return the exit code and the message of an error."""
    if isinstance(error, ModuleNotFoundError):
        from edgelm.cli.extras import missing_extra_error

        error = missing_extra_error(error, command)
    if _is_interrupt(error):
        return 130, "interrupted"
    if isinstance(error, UsageError):
        return 2, f"{error} ({command.strip() if command.split()[-1] in COMMANDS else 'edgelm'} --help)"
    if isinstance(error, EdgelmError):
        return 1, str(error)
    if isinstance(error, OSError) and error.strerror:
        return 1, f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return 1, f"internal error: {type(error).__name__}: {error} (--debug shows where)"


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error: a library that is interrupted during import raises another exception."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, KeyboardInterrupt):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _chosen(arguments: list[str]) -> str:
    return next((word for word in arguments if not word.startswith("-")), "")


def _parse(arguments: list[str], chosen: str) -> argparse.Namespace:
    """Parse a command line. Raises `UsageError`."""
    parser, commands = _make_parsers({chosen})
    if not chosen and arguments and not {"-h", "--help", "--version"}.intersection(arguments):
        raise UsageError(f"unknown argument {arguments[0]!r}{_suggest(arguments[0], parser.options())}")
    if chosen and chosen not in COMMANDS:
        raise UsageError(f"there is no command {chosen!r}{_suggest(chosen, COMMANDS)}")
    args, unknown = parser.parse_known_args(arguments if chosen else [*arguments, "--help"])
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])
        suggestion = _suggest(flag.partition("=")[0], commands[chosen].options())
        raise UsageError(f"unknown argument {flag!r}{suggestion}")
    return args


def make_parser() -> Parser:
    """Return the parser with the arguments of every command, for manual pages and shell completion."""
    return _make_parsers(COMMANDS)[0]


def _make_parsers(loaded: Container[str]) -> tuple[Parser, Mapping[str, Parser]]:
    """Return the parser and those of the commands; only commands in `loaded` are imported and have arguments.

    A command line loads one command, so that `edgelm --help` needs no library.
    """
    parser = Parser(
        prog="edgelm",
        description="Small language models on a board: distil, quantize, export, serve over MQTT.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edgelm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".", allow_abbrev=False
        )
        if name in loaded:
            module = import_module(f"edgelm.cli.{MODULES.get(name, name)}")
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
            command.set_defaults(run=module.run)
    return parser, commands.choices


def _suggest(word: str, known: Iterable[str], cutoff: float = 0.7) -> str:
    from edgelm.validation import suggest_match  # its imports take 5 ms, and only errors need it

    return suggest_match(word, known, cutoff)
