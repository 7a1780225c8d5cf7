"""`edgelm eval`: measure the quality of a bundle on text or tasks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import edgelm
from edgelm.cli.extras import import_extra
from edgelm.cli.flags import BUNDLE_HELP, add_loading_flags, loading_from
from edgelm.cli.tables import quality_table
from edgelm.errors import EdgelmError, UsageError
from edgelm.evaluation.evaluate import evaluate_text
from edgelm.evaluation.tasks import read_tasks, score_tasks
from edgelm.model import Model
from edgelm.system.progress_bar import ProgressBar
from edgelm.text.documents import split_documents

MAX_TASK_TOKENS = 256
"""Largest length of an answer to a task."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument(
        "--text", metavar="FILE", help="measure perplexity on documents separated by lines <|endoftext|>"
    )
    parser.add_argument(
        "--task", metavar="FILE", help='measure exact match and JSON fields on lines of {"prompt", "target"}'
    )
    parser.add_argument(
        "--raw", action="store_true", help="complete a task's prompt as plain text, without the chat template"
    )
    parser.add_argument(
        "--long-documents",
        choices=["truncate", "window"],
        default="truncate",
        help="text longer than the context: cut it, or score it in windows that overlap by half (default: truncate)",
    )
    parser.add_argument(
        "--reference",
        metavar="CHECKPOINT",
        help="unquantized checkpoint to compare with, on --text",
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="with --reference: the LoRA adapter that was merged into the bundle"
    )
    add_loading_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and print the result."""
    if not args.text and not args.task:
        raise UsageError("--text FILE or --task FILE is required (or both)")
    if args.reference and not args.text:
        raise UsageError("--reference needs --text FILE")
    if args.adapter and not args.reference:
        raise UsageError("--adapter needs --reference CHECKPOINT")
    text = _read(args.text) if args.text else None
    tasks = read_tasks(Path(args.task)) if args.task else None
    result: dict[str, Any] = {}
    with edgelm.load(args.bundle, **loading_from(args)) as model, ProgressBar() as progress:
        if text is not None:
            quality = evaluate_text(model, split_documents(text), long_documents=args.long_documents, progress=progress)
            if quality.truncated:
                print(
                    f"{quality.truncated} of {quality.documents} documents are longer than the context of"
                    f" {model.context}: {quality.skipped} tokens were cut; --long-documents window"
                    " measures them too",
                    file=sys.stderr,
                )
            result["perplexity"] = quality.perplexity
            result["bits_per_byte"] = quality.bits_per_byte
            result["tokens"] = quality.tokens
        if tasks is not None:
            result["task"] = score_tasks(
                tasks, _answers(model, [task.prompt for task in tasks], args.raw, progress)
            ).to_dict()
    if args.reference:
        result["reference"] = _compare(args)
    if args.json:
        print(json.dumps(result))
        return 0
    print(_table({name: value for name, value in result.items() if name != "reference"}))
    if args.reference:
        print(quality_table(result["reference"]))
    return 0


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    package = import_extra("edgelm_export", "edgelm eval --reference")
    with ProgressBar() as progress:
        measured: dict[str, Any] = package.compare(
            args.bundle, args.reference, args.text, adapter=args.adapter, context=args.context, progress=progress
        )
    return measured


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EdgelmError(f"{file} cannot be read: {error}") from error


def _answers(model: Model, prompts: list[str], raw: bool, progress: ProgressBar) -> list[str]:
    answers = []
    for number, prompt in enumerate(prompts):
        progress("task", number, len(prompts))
        answers.append(model.generate(prompt, max_tokens=MAX_TASK_TOKENS, temperature=0.0, raw=raw).text)
    return answers


def _table(result: dict[str, Any]) -> str:
    flat = {**result, **result.get("task", {})}
    flat.pop("task", None)
    rows = [(name, value) for name, value in flat.items() if value is not None]
    return "\n".join(
        f"{name:<14} {value:.4f}" if isinstance(value, float) else f"{name:<14} {value}" for name, value in rows
    )
