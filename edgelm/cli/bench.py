"""`edgelm bench`: measure the speed of a bundle on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Final

from edgelm.bench.autotune import TuningResult, tune
from edgelm.bench.benchmark import BenchmarkReport, benchmark
from edgelm.bench.profiler import DECODE_STEPS, ProfileReport, profile_bundle
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.cli.flags import BUNDLE_HELP, THREADS_HELP, add_cache_flag
from edgelm.cli.profile_table import profile_table
from edgelm.errors import UsageError
from edgelm.system.board_cache import BoardCache
from edgelm.system.progress_bar import ProgressBar

PROMPT_TOKENS: Final = 256
NEW_TOKENS: Final = 128

MAX_IDLE_LOAD: Final = 0.5
"""Load average above which other programs disturb a comparison."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help=f"prompt length (default: {PROMPT_TOKENS}, at most half the context)",
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to decode (default: {NEW_TOKENS}, at most the rest of the context)",
    )
    parser.add_argument(
        "--batch", type=_numbers, default=(1,), metavar="1,4,8", help="requests decoded together (default: 1)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help=THREADS_HELP)
    parser.add_argument(
        "--repeat", type=int, default=5, metavar="N", help="measured rounds, after one warm-up round (default: 5)"
    )
    parser.add_argument(
        "--tune", action="store_true", help="compare thread settings instead, and keep the fastest one for later runs"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="show the time of each operator and layer instead, from onnxruntime's profile of --repeat prefills and of"
        f" {DECODE_STEPS} decode steps (at most --new-tokens) of each --batch, and the time of the same steps without"
        " profiling",
    )
    add_cache_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object of medians, or of the profile")


def run(args: argparse.Namespace) -> int:
    """Measure and print the result."""
    cache = BoardCache.default() if args.cache is not False else None
    if args.tune and args.profile:
        raise UsageError("--tune and --profile exclude each other")
    if args.tune:
        return _tune(args, cache)
    prompt_tokens, new_tokens = _lengths(args)
    measure: Callable[..., BenchmarkReport | ProfileReport] = profile_bundle if args.profile else benchmark
    with ProgressBar() as progress:
        report = measure(
            args.bundle,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batches=args.batch,
            threads=args.threads,
            cache=cache,
            repeat=args.repeat,
            progress=progress,
        )
    text = profile_table(report) if isinstance(report, ProfileReport) else _table(report)
    print(json.dumps(report.to_dict()) if args.json else text)
    return 0


def _lengths(args: argparse.Namespace) -> tuple[int, int]:
    """Return the lengths of prompt and answer: the flags' values, else the defaults as far as the context allows."""
    context = open_bundle(args.bundle, verify=False).manifest.context
    prompt, new = args.prompt_tokens, args.new_tokens
    if prompt is None:
        prompt = max(1, min(PROMPT_TOKENS, context // 2, context - (new or 0)))
    if new is None:
        new = max(1, min(NEW_TOKENS, context - prompt))
    return prompt, new


def _tune(args: argparse.Namespace, cache: BoardCache | None) -> int:
    """Measure thread settings, print them, and keep the fastest one."""
    if cache is None or args.threads is not None:
        raise UsageError("--tune chooses the number of threads and stores it: remove --threads and --no-cache")
    load = os.getloadavg()[0]
    if load > MAX_IDLE_LOAD:
        print(f"edgelm: other programs are running (load {load:.1f}): tune again when they have ended", file=sys.stderr)
    with ProgressBar() as progress:
        trials, best, kept = tune(args.bundle, cache, progress)
    if args.json:
        print(json.dumps({"best": asdict(best), "kept": kept, "trials": [_flat(trial) for trial in trials]}))
        return 0
    print(f"{'threads':>7} {'idle':>10} {'decode tok/s':>13} {'prefill tok/s':>14}")
    for trial in trials:
        idle, mark = "spin" if trial.tuning.spin else "sleep", "  <- best" if trial.tuning == best else ""
        rates = f"{trial.decode_tok_s:>13.1f} {trial.prefill_tok_s:>14.1f}"
        print(f"{trial.tuning.threads:>7} {idle:>10} {rates}{mark}")
    print(f"stored in {cache.folder}: runs without --threads use it" if kept else "not stored")
    return 0


def _flat(trial: TuningResult) -> dict[str, float]:
    rates = {"decode_tok_s": round(trial.decode_tok_s, 2), "prefill_tok_s": round(trial.prefill_tok_s, 2)}
    return {**asdict(trial.tuning), **rates}


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,4,8, got {text!r}") from None


def _table(report: BenchmarkReport) -> str:
    memory = ", ".join(
        f"{name.removesuffix('_mb').replace('_', ' ')} {value:.0f} MB" for name, value in report.memory.items()
    )
    lines = [
        f"{report.threads} threads, memory bandwidth {report.memory_bandwidth_gb_s:.1f} GB/s (read, measured),"
        f" loaded in {report.load_s:.2f} s, {memory}, sampler {report.sampler_us:.0f} us",
        f"{'batch':>5} {'prompt':>6} {'new':>5} {'prefill tok/s':>24} {'decode tok/s':>24}"
        f" {'first token ms':>16} {'bandwidth':>9}",
    ]
    for run in report.runs:
        rates = [f"{s.median:.1f} ({s.minimum:.1f}-{s.maximum:.1f})" for s in (run.prefill_tok_s, run.decode_tok_s)]
        lines.append(
            f"{run.batch:>5} {run.prompt_tokens:>6} {run.new_tokens:>5} {rates[0]:>24} {rates[1]:>24}"
            f" {run.ttft_ms.median:>16.1f} {100 * run.bandwidth_share:>8.0f}%"
        )
    return "\n".join(lines)
