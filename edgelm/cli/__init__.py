"""The command line: chooses one sub-command, imports it alone, and turns errors into one line and an exit code.

Each command is one module `edgelm.cli.<name>`, but for `MODULES`, with `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NoReturn

from edgelm._version import __version__
from edgelm.cli.suggestion import suggest_match
from edgelm.errors import EdgelmError, UsageError
from edgelm.system.terminal import escape_output

COMMANDS: Final[dict[str, str]] = {
    "demo": "start a broker, serve the built-in model, ask it three things, stop",
    "models": "show the models that are known by name",
    "pull": "fetch a model by name and convert it for this board",
    "list": "show the models that are here",
    "show": "show what is known of a model",
    "rm": "remove models",
    "export": "turn a checkpoint (Hugging Face, GGUF, Ollama) into a quantized ONNX bundle",
    "prefix": "keep what prompts begin with in a bundle, computed",
    "info": "show what a bundle is: manifest, sizes, quality, memory",
    "generate": "answer one prompt",
    "chat": "hold a conversation",
    "serve": "answer over MQTT",
    "ask": "ask a board over MQTT",
    "bench": "measure a bundle on this machine",
    "cache": "show or remove what is kept for this board between runs",
    "eval": "measure a bundle's quality on text or tasks",
    "distill": "train a small student, with or without a teacher",
    "devices": "know, check and emulate boards",
}

MODULES: Final = {"list": "listing"}
"""Modules that are not called as their commands are: a module `list` of this package would hide the type."""

ANSWERING: Final = frozenset({"generate", "chat", "ask"})
"""Commands whose output is a model's answer: piped, it is the model's own characters."""

EPILOG: Final = """\
A BUNDLE is a directory that `edgelm export` wrote, the name of a model of `edgelm list`, or `builtin`, the one inside
the package.
Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """One whose errors are raised: `main` makes one line of each."""

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`, with what may have been meant."""
        wrong = re.search(r"invalid choice: '?([^' ]+)'? \(choose from (.*)\)", message)
        raise UsageError(message + (suggest_match(wrong[1], re.findall(r"[\w.-]+", wrong[2]), 0.8) if wrong else ""))

    def options(self) -> set[str]:
        """Return the flags of the command and of the commands below it."""
        below = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
        found = {flag for action in self._actions for flag in action.option_strings}
        return found.union(*(parser.options() for action in below for parser in action.choices.values()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = _chosen(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # a terminal that has no such letter shows which it is
    with escape_output(raw_stdout=chosen in ANSWERING or "--json" in arguments):
        return _run(arguments, chosen)


def _run(arguments: list[str], chosen: str) -> int:
    try:
        args = _parse(arguments, chosen)
        return int(args.run(args))
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  whatever it is: one line
        if "--debug" in arguments:
            traceback.print_exc()
        code, reason = _explain(error, f"edgelm {chosen}")
        print(f"edgelm {chosen}: {' '.join(reason.split())}" if chosen else f"edgelm: {reason}", file=sys.stderr)
        return code


def _explain(error: BaseException, command: str) -> tuple[int, str]:
    """Return an error's exit code and what to tell of it."""
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
    """Whether Ctrl-C is behind an error: a library that is just being imported makes another one of it."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, KeyboardInterrupt):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _chosen(arguments: list[str]) -> str:
    return next((word for word in arguments if not word.startswith("-")), "")


def _parse(arguments: list[str], chosen: str) -> argparse.Namespace:
    """Import the chosen command alone, so that `edgelm --help` stays instant. Raises `UsageError`."""
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
        if name == chosen:
            module = import_module(f"edgelm.cli.{MODULES.get(name, name)}")
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
            command.set_defaults(run=module.run)
    if not chosen and arguments and not {"-h", "--help", "--version"}.intersection(arguments):
        raise UsageError(f"unknown argument {arguments[0]!r}{suggest_match(arguments[0], parser.options())}")
    if chosen and chosen not in COMMANDS:
        raise UsageError(f"there is no command {chosen!r}{suggest_match(chosen, COMMANDS)}")
    args, unknown = parser.parse_known_args(arguments if chosen else [*arguments, "--help"])
    if unknown:
        options = commands.choices[chosen].options()
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])
        raise UsageError(f"unknown argument {flag!r}{suggest_match(flag.partition('=')[0], options)}")
    return args
