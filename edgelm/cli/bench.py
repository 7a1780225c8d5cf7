"""`edgelm bench`: how fast a bundle is on this machine."""

from __future__ import annotations

import argparse
import json

from edgelm.benchmark import Report, benchmark
from edgelm.cli.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory, or builtin")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="N", help="length of the prompt (256)")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens to decode (128)")
    parser.add_argument("--batch", type=_numbers, default=(1,), metavar="1,4,8", help="requests decoded together (1)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (the cores, at most 4)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="measured rounds (5), after one unmeasured")
    parser.add_argument("--json", action="store_true", help="print one JSON object of medians")


def run(args: argparse.Namespace) -> int:
    """Measure and show."""
    with Progress() as progress:
        report = benchmark(
            args.bundle,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            batches=args.batch,
            threads=args.threads,
            repeat=args.repeat,
            progress=progress,
        )
    print(json.dumps(report.to_dict()) if args.json else _table(report))
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,4,8, got {text!r}") from None


def _table(report: Report) -> str:
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
        rates = [f"{s.median:.1f} ({s.least:.1f}-{s.most:.1f})" for s in (run.prefill_tok_s, run.decode_tok_s)]
        lines.append(
            f"{run.batch:>5} {run.prompt_tokens:>6} {run.new_tokens:>5} {rates[0]:>24} {rates[1]:>24}"
            f" {run.ttft_ms.median:>16.1f} {100 * run.bandwidth_share:>8.0f}%"
        )
    return "\n".join(lines)
