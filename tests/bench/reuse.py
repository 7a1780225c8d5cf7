"""What reused prefixes and guessed tokens save: `python -m tests.bench.reuse BUNDLE [--tasks FILE]`; by hand.

With random tokens: the time to the first token of a prompt of 200 known tokens and 10 new ones, beside one of 210 new
ones. With a task file (lines of {"prompt", "target"}): answers with guesses and without, each by a process of its own,
since two sessions' threads would be in each other's way. Everything in turns; medians of the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import edgelm

KNOWN, NEW = 200, 10


def first_token(bundle: str, threads: int, rounds: int) -> None:
    """Print milliseconds to the first token, known and unknown, and their ratio."""
    generator = np.random.default_rng(0)
    with edgelm.load(bundle, threads=threads, max_batch=1) as model:

        def ask(*parts: np.ndarray) -> float:
            tokens = np.concatenate(parts).tolist()
            return model.generate(tokens=tokens, max_tokens=1, ignore_eos=True).timing.ttft_ms

        def random(count: int) -> np.ndarray:
            return generator.integers(3, model.manifest.vocab_size, count)

        system = random(KNOWN)
        ask(system, random(NEW))
        pairs = [(ask(random(KNOWN + NEW)), ask(system, random(NEW))) for _ in range(rounds)]
    cold, warm = (statistics.median(each) for each in zip(*pairs, strict=True))
    ratios = [one / other for one, other in pairs]
    print(f"first token of {KNOWN + NEW}: {cold:.1f} ms, with {KNOWN} known {warm:.1f} ms,", spread(ratios))


def answers(bundle: str, threads: int, tasks: Path, speculation: bool) -> None:
    """Print the tokens and seconds of all answers, as JSON."""
    prompts = [json.loads(line)["prompt"] for line in tasks.read_text(encoding="utf-8").splitlines()]
    with edgelm.load(bundle, threads=threads, max_batch=1, speculation=speculation) as model:
        model.generate(prompts[0])
        begun = time.perf_counter()
        texts = [model.generate(prompt) for prompt in prompts]
        seconds = time.perf_counter() - begun
    found = {"tokens": sum(len(each.tokens) for each in texts), "seconds": seconds, "texts": [e.text for e in texts]}
    print(json.dumps(found))


def compare(bundle: str, threads: int, tasks: Path, rounds: int) -> None:
    """Print tokens a second with guesses and without, and the ratio."""
    rates: dict[str, list[float]] = {"no": [], "yes": []}
    texts: dict[str, list[str]] = {}
    for number in range(rounds):
        for speculation in ("no", "yes") if number % 2 else ("yes", "no"):
            command = [sys.executable, "-m", "tests.bench.reuse", bundle, "--threads", str(threads)]
            command += ["--tasks", str(tasks), "--answers", speculation]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rates[speculation].append(found["tokens"] / found["seconds"])
            texts[speculation] = found["texts"]
    same = sum(one == other for one, other in zip(texts["no"], texts["yes"], strict=True))
    no, yes = (statistics.median(rates[key]) for key in ("no", "yes"))
    ratios = [one / other for one, other in zip(rates["yes"], rates["no"], strict=True)]
    print(f"{no:.0f} tokens/s, with guesses {yes:.0f}, {spread(ratios)}; {same} of {len(texts['no'])} answers the same")


def spread(ratios: list[float]) -> str:
    """Return a median ratio with its ends."""
    return f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", type=Path, metavar="FILE")
    parser.add_argument("--answers", choices=("yes", "no"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answers:
        answers(args.bundle, args.threads, args.tasks, args.answers == "yes")
        return 0
    first_token(args.bundle, args.threads, args.rounds)
    if args.tasks:
        compare(args.bundle, args.threads, args.tasks, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
