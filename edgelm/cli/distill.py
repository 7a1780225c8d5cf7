"""`edgelm distill`: train a small student on tasks, with or without a teacher."""

from __future__ import annotations

import argparse
import json
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from edgelm.cli.extras import reach
from edgelm.cli.progress import Progress
from edgelm.errors import ConfigError, UsageError

EPILOG = """\
DATA holds one {"prompt", "target"} object a line; only targets are learned.
Examples:
  edgelm distill --student hidden=128,layers=4,heads=4,kv-heads=2,mlp=384 --data tasks.jsonl --out student/
  edgelm distill --teacher teacher/ --student hidden=128,layers=4,heads=4 --data tasks.jsonl --out student/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `edgelm distill`; defaults not stated here are those of `Settings`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "--student",
        required=True,
        metavar="DIR|SHAPE",
        help="checkpoint to go on from, or a new student's shape; one that differs from the teacher's in the number of"
        " layers alone begins with layers of the teacher",
    )
    add("--data", required=True, type=Path, metavar="FILE", help="JSONL of prompts and targets")
    add("--out", required=True, type=Path, metavar="DIR", help="Hugging Face directory to make")
    add("--teacher", type=Path, metavar="DIR", help="checkpoint whose logits to follow (default: none)")
    add("--loss", choices=("kl", "ce"), help="kl: follow the teacher (default with one); ce: the data's tokens alone")
    add("--kl-weight", type=float, help="share of the teacher in the loss, 0 to 1 (0.7)")
    add("--temperature", type=float, help="softening of both distributions, over 0 (2)")
    add("--teacher-top-k", type=int, help="the teacher's best tokens to keep; 0: ask it for all at every step (32)")
    add("--epochs", type=int, help="passes over the data (10)")
    add("--max-seconds", dest="max_s", type=float, help="end the run after this long, whatever --epochs says")
    add("--batch-tokens", type=int, help="tokens in a batch (4096)")
    add("--row-length", type=int, help="tokens in a packed row: the longest example allowed (128)")
    add("--lr", type=float, help="peak learning rate (0.002)")
    add("--dropout", type=float, help="of the residual, 0 to 1 (0)")
    add("--averaging", type=float, help="decay of the weights' moving average, 0 to 1 (0: off)")
    add("--vocab-size", type=int, default=2048, help="of a new student's own tokenizer (%(default)s)")
    add("--seed", type=int, help="of everything random (0)")
    add("--muon", action="store_true", help="orthogonalize updates of matrices: fewer, dearer steps")
    add("--bf16", action="store_true", help="multiply in bfloat16: faster where the processor has it")
    add("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    add("--threads", type=int, help="processor threads (all cores)")
    add("--resume", action="store_true", help="go on with an interrupted run, from its last checkpoint")
    add("--force", action="store_true", help="replace OUT, discard an interrupted run")
    add("--json", action="store_true", help="print one JSON object at the end")


SETTINGS = (
    "averaging",
    "batch_tokens",
    "dropout",
    "epochs",
    "kl_weight",
    "lr",
    "max_s",
    "row_length",
    "seed",
    "teacher_top_k",
    "temperature",
)
"""Options that are fields of `Settings`."""


def run(args: argparse.Namespace) -> int:
    """Train; print where the student is."""
    if args.loss == "kl" and args.teacher is None:
        raise UsageError("--loss kl needs --teacher")
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads {args.threads} must be at least 1")
    pipeline = reach("edgelm_export.distill.pipeline", "edgelm distill")
    if args.threads:
        import_module("torch").set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    settings = import_module("edgelm_export.distill.settings").Settings(bf16=args.bf16, muon=args.muon, **given)
    with Progress() as bar:
        progress = pipeline.distill(
            args.student,
            args.data,
            args.out,
            settings,
            teacher=None if args.loss == "ce" else args.teacher,
            vocab_size=args.vocab_size,
            device=pipeline.choose_device(args.device),
            resume=args.resume,
            force=args.force,
            report=partial(show, bar),
        )
    result = {
        "out": str(args.out),
        "epochs": progress.epoch + 1,
        "steps": progress.step,
        "tokens": progress.tokens,
        "loss": round(progress.loss, 4),
        "elapsed_s": round(progress.elapsed_s, 1),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.out}: {progress.step} steps in {progress.elapsed_s:.0f} s, loss {progress.loss:.3f}")
    return 0


def show(bar: Progress, progress: Any) -> None:
    """Show a run's `edgelm_export.distill.settings.Progress` on the terminal."""
    bar(f"epoch {progress.epoch + 1}, loss {progress.loss:.3f}", round(100 * progress.share), 100)
