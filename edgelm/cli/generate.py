"""`edgelm generate`: answer one prompt."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import edgelm
from edgelm.cli.flags import (
    BUNDLE_HELP,
    add_loading_flags,
    add_raw_flag,
    add_sampling_flags,
    add_template_flags,
    loading_from,
    read_prompt,
    sampling_from,
    template_from,
)
from edgelm.cli.tables import explain_truncation
from edgelm.errors import UsageError
from edgelm.model import Model
from edgelm.system.progress_bar import Spinner
from edgelm.types import Completion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt; - reads it from standard input")
    parser.add_argument("--tokens", metavar="1,2,3", help="token ids, instead of PROMPT")
    add_raw_flag(parser)
    add_template_flags(parser)
    add_sampling_flags(parser)
    add_loading_flags(parser)
    parser.add_argument("--no-stream", action="store_true", help="print the answer only when it is complete")
    parser.add_argument("--json", action="store_true", help="print one JSON object: text, tokens, usage, timing")


def run(args: argparse.Namespace) -> int:
    """Answer the prompt."""
    prompt = _read_input(args)
    given = {**sampling_from(args), **template_from(args)}
    with Spinner("preparing the model for this processor"):
        model = edgelm.load(args.bundle, **loading_from(args), max_batch=1)
    with model:
        if args.json or args.no_stream:
            done = model.generate(**prompt, **given)
            print(json.dumps(done.to_dict(), ensure_ascii=False) if args.json else done.text)
        else:
            done = _stream(model, {**prompt, **given})
        truncation = None if args.json else explain_truncation(done, model.context)
    if truncation is not None:
        print(f"edgelm: {truncation}", file=sys.stderr)
    return 0


def _read_input(args: argparse.Namespace) -> dict[str, Any]:
    if (args.prompt is None) == (args.tokens is None):
        raise UsageError("exactly one of PROMPT or --tokens is required")
    if args.tokens is not None:
        try:
            return {"tokens": [int(word) for word in args.tokens.split(",")]}
        except ValueError:
            raise UsageError(f"--tokens takes ids such as 1,2,3; got {args.tokens!r}") from None
    return {"prompt": read_prompt(args.prompt)}


def _stream(model: Model, options: dict[str, Any]) -> Completion:
    for chunk in model.stream(**options):
        print(chunk.delta, end="", flush=True)
        if chunk.completion is not None:
            print()
            return chunk.completion
    raise AssertionError("a stream must end with a completion")
