"""What a static prefix saves a service's first request: `python -m tests.bench.first_request BUNDLE`; by hand.

Every request is asked of a process of its own, just loaded: 200 tokens that the bundle, or its copy with a prefix,
begins with, and 10 more. In turns; medians.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.bundle.manifest import MANIFEST
from edgelm.runtime.prefix_file import add_prefix
from tests.bench.reuse import KNOWN, NEW, spread


def ask(bundle: str, tokens: list[int], threads: int) -> None:
    """Load and ask once; print milliseconds to the first token, seconds of loading, and the tokens not computed."""
    begun = time.perf_counter()
    with edgelm.load(bundle, threads=threads, max_batch=1) as model:
        load_s = time.perf_counter() - begun
        done = model.generate(tokens=tokens, max_tokens=1, ignore_eos=True)
    print(json.dumps({"ttft_ms": done.timing.ttft_ms, "load_s": load_s, "cached": done.usage.cached_tokens}))


def compare(plain: Path, prefixed: Path, threads: int, rounds: int) -> None:
    """Print the time to the first token of both."""
    bundle = open_bundle(plain)
    tokens = np.random.default_rng(0).integers(3, bundle.manifest.vocab_size, KNOWN + NEW).tolist()
    for name in (*bundle.manifest.files, MANIFEST):
        shutil.copy(bundle.path / name, prefixed / name)
    add_prefix(open_bundle(prefixed), tokens[:KNOWN])
    found: dict[Path, list[dict[str, float]]] = {bundle.path: [], prefixed: []}
    for number in range(rounds):
        for path in list(found)[:: 1 if number % 2 else -1]:
            command = [sys.executable, "-m", "tests.bench.first_request", str(path), "--threads", str(threads)]
            command += ["--tokens", json.dumps(tokens)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[path].append(json.loads(answer))
    without, with_it = found.values()
    assert {each["cached"] for each in without} == {0}
    assert {each["cached"] for each in with_it} == {KNOWN}
    for name, unit in (("ttft_ms", "ms to the first token"), ("load_s", "s to load")):
        pairs = [(one[name], other[name]) for one, other in zip(without, with_it, strict=True)]
        one, other = (statistics.median(each) for each in zip(*pairs, strict=True))
        print(f"{unit}: {one:.3g}, with the prefix {other:.3g}, {spread([one / other for one, other in pairs])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens:
        ask(args.bundle, json.loads(args.tokens), args.threads)
        return 0
    bundle = open_bundle(args.bundle).path
    with tempfile.TemporaryDirectory() as folder:
        compare(bundle, Path(folder), args.threads, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
