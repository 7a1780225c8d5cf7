"""Runs cases by their numbers, a line in and a line of JSON out: started and watched by `tests.fuzzing.bundles`."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil

from . import cases

MEMORY_BYTES = 3_000_000_000
"""Address space that a case may take beside what the child has when it starts."""


def main(work: Path, seed: int) -> None:
    """Answer until the input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    if cases.can_export():
        import edgelm_export  # noqa: F401  before memory is limited
    cases.strictly()
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({}), file=out, flush=True)
    for line in sys.stdin:
        out.write(json.dumps(_answer(work, seed, int(line))) + "\n")
        out.flush()


def _answer(work: Path, seed: int, number: int) -> dict[str, object]:
    case, begun, finding = cases.Case(work, seed, number), time.monotonic(), None
    folder = Path(tempfile.mkdtemp(dir=work))
    before = sys.getrecursionlimit()
    try:
        case.run(folder)
    except BaseException as error:  # noqa: BLE001  a panic of a Rust library is none of `Exception`
        frames = traceback.extract_tb(error.__traceback__)
        at = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:1:-1][:6])
        finding = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} at {at}"
        del error
    if sys.getrecursionlimit() != before:
        finding = finding or "the recursion limit is another"
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "number": number,
        "what": case.what,
        "said": case.said,
        "finding": finding,
        "seconds": time.monotonic() - begun,
    }
