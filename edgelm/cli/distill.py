"""`edgelm distill`: train a small student model on tasks, with or without a teacher."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from edgelm.cli.extras import import_extra
from edgelm.errors import ConfigError, UsageError
from edgelm.system.progress_bar import ProgressBar

EPILOG = """\
FILE of --data holds one {"prompt", "target"} object per line; the loss counts only the tokens of targets.
Examples:
  edgelm distill --student hidden=128,layers=4,heads=4,kv-heads=2,mlp=384 --data tasks.jsonl --out student/
  edgelm distill --teacher teacher/ --student hidden=128,layers=4,heads=4 --data tasks.jsonl --out student/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `edgelm distill`; defaults that are not set here are those of `Settings`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "--student",
        required=True,
        metavar="DIR|SHAPE",
        help="checkpoint to continue from, or the shape of a new student; if only the number of layers differs from the"
        " teacher's, the student starts with layers of the teacher",
    )
    add("--data", required=True, type=Path, metavar="FILE", help="JSONL of prompts and targets")
    add("--out", required=True, type=Path, metavar="DIR", help="Hugging Face directory to write")
    add("--teacher", type=Path, metavar="DIR", help="checkpoint whose logits are learned (default: none)")
    add(
        "--loss",
        choices=("kl", "ce"),
        help="kl: learn the teacher's logits (default with --teacher); ce: only the targets",
    )
    add("--kl-weight", type=float, metavar="X", help="weight of the KL term in the loss, 0 to 1 (default: 0.7)")
    add(
        "--temperature",
        type=float,
        metavar="X",
        help="softmax temperature of teacher and student, above 0 (default: 2)",
    )
    add(
        "--teacher-top-k",
        type=int,
        metavar="N",
        help="teacher logits stored per position (default: 32); 0: compute all of them at every step",
    )
    add("--epochs", type=int, metavar="N", help="passes over the data (default: 10 to 60, fewer for more data)")
    add(
        "--max-seconds",
        dest="max_s",
        type=float,
        metavar="S",
        help="end training after this time, even before --epochs",
    )
    add("--batch-tokens", type=int, metavar="N", help="tokens in a batch (default: 1/32 of the data, 512 to 4096)")
    add(
        "--row-length",
        type=int,
        metavar="N",
        help="tokens in a packed row, the longest allowed example (default: the longest one)",
    )
    add("--held-out", type=int, metavar="N", help="examples kept for scoring, not for training (default: 10 %%)")
    add("--lr", type=float, metavar="X", help="peak learning rate (default: 0.002)")
    add("--dropout", type=float, metavar="X", help="dropout of the residual stream, 0 to 1 (default: 0)")
    add(
        "--averaging",
        type=float,
        metavar="X",
        help="decay of the moving average of the weights, 0 to 1 (default: 0, off)",
    )
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        default=2048,
        help="vocabulary of a new student's tokenizer (default: %(default)s)",
    )
    add("--seed", type=int, metavar="N", help="random seed (default: 0)")
    add("--muon", action="store_true", help="optimizer Muon for matrices: fewer steps, each more expensive")
    add("--bf16", action="store_true", help="multiply in bfloat16: faster on processors that support it")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add(
        "--threads",
        type=int,
        metavar="N",
        help="processor threads (default: the fastest number in a short measurement)",
    )
    add("--resume", action="store_true", help="continue an interrupted run from its last checkpoint")
    add("--force", action="store_true", help="replace DIR of --out and discard an interrupted run")
    add("--json", action="store_true", help="print one JSON object at the end")


SETTING_NAMES = (
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

WHOLE_NUMBERS = ("epochs", "batch_tokens", "row_length")


def run(args: argparse.Namespace) -> int:
    """Train the student; print its path and its score."""
    if args.loss == "kl" and args.teacher is None:
        raise UsageError("--loss kl needs --teacher")
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads {args.threads} must be at least 1")
    pipeline = import_extra("edgelm_export.distill.distill", "edgelm distill")
    given = {name: getattr(args, name) for name in SETTING_NAMES if getattr(args, name) is not None}
    for name in WHOLE_NUMBERS:
        if given.get(name, 1) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {given[name]} must be at least 1")
    with ProgressBar() as bar:
        outcome = pipeline.distill(
            args.student,
            args.data,
            args.out,
            {**given, "bf16": args.bf16, "muon": args.muon},
            held_out=args.held_out,
            threads=args.threads,
            teacher=None if args.loss == "ce" else args.teacher,
            vocab_size=args.vocab_size,
            device=pipeline.choose_device(args.device),
            resume=args.resume,
            force=args.force,
            report=lambda state: bar(state.summary, round(100 * state.fraction_done), 100),
            on_message=lambda what: bar(what, 0, 1),
        )
    progress, settings, score = outcome.progress, outcome.settings, outcome.score
    result = {
        "out": str(args.out),
        "epochs": progress.epoch + 1,
        "steps": progress.step,
        "tokens": progress.tokens,
        "loss": round(progress.loss, 4),
        "elapsed_s": round(progress.elapsed_s, 1),
        "batch_tokens": settings.batch_tokens,
        "row_length": settings.row_length,
        "held_out": None if score is None else score.to_dict(),
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.out}: {progress.step} steps in {progress.elapsed_s:.0f} s, loss {progress.loss:.3f}")
        print(score_text(score))
    if score is not None and is_all_wrong(score):
        print(
            "edgelm distill: nothing was learnt: no held-out answer is correct. More steps (--epochs, smaller"
            " --batch-tokens), more data, a larger student or a teacher may help",
            file=sys.stderr,
        )
    elif not args.json:
        print(f"next: edgelm export {args.out} {args.out}-bundle --quant int8", file=sys.stderr)
    return 0


def is_all_wrong(score: Any) -> bool:
    """Return whether no answer of a `TaskScore` is correct, neither as text nor as JSON."""
    return not score.exact and not score.frame


def score_text(score: Any) -> str:
    """Return the score of held-out examples in one line."""
    if score is None:
        return "held out: no examples; --held-out N keeps N examples for scoring"
    names = {"exact": "exact", "frame": "same JSON", "intent": "same intent"}
    parts = [f"{label} {getattr(score, name):.1%}" for name, label in names.items() if getattr(score, name) is not None]
    if score.slot_f1 is not None:
        parts.append(f"slot F1 {score.slot_f1:.1%}")
    return f"held out: {score.n} examples: {', '.join(parts)}"
