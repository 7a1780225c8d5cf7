"""`edgelm completion`: print a completion script for a shell.

The script is static: a press of Tab starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from edgelm.cli import make_parser
from edgelm.cli.extras import import_extra

SHELLS = ("bash", "zsh", "tcsh")
PATHS = ("BUNDLE", "CHECKPOINT", "DIR", "FILE", "OUT")
"""Metavars of arguments that are paths."""

EPILOG = """\
examples:
  edgelm completion bash >~/.local/share/bash-completion/completions/edgelm
  edgelm completion zsh >~/.zfunc/_edgelm      with fpath+=(~/.zfunc) before compinit in ~/.zshrc
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def run(args: argparse.Namespace) -> int:
    """Print the script. Raises `MissingExtraError` if shtab is not installed."""
    shtab = import_extra("shtab", "edgelm completion")
    parser = make_parser()
    _mark_paths(parser, dict.fromkeys(PATHS, shtab.FILE))
    print(shtab.complete(parser, shell=args.shell))
    return 0


def _mark_paths(parser: argparse.ArgumentParser, completions: Mapping[str, object]) -> None:
    """Set the attribute `complete`, which shtab reads, on every argument whose metavar names a path."""
    for action in parser._actions:  # noqa: SLF001  argparse has no public list of arguments
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                _mark_paths(command, completions)
        elif isinstance(action.metavar, str) and action.metavar in completions:
            action.complete = completions[action.metavar]  # type: ignore[attr-defined]
