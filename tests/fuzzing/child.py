"""Runs cases: reads a number per line and writes a line of JSON; `tests.fuzzing.bundles` starts and watches it."""

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
"""Address space that a case may use in addition to the child's at its start."""


def main(work: Path, seed: int) -> None:
    """Run cases until the input ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # keeps output of libraries apart from results
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    logging.disable(logging.CRITICAL)
    if cases.can_export():
        import edgelm_export  # noqa: F401  imported before the memory limit is set
    cases.raise_warnings()
    limit = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps({}), file=out, flush=True)
    for line in sys.stdin:
        out.write(json.dumps(_run_case(work, seed, int(line))) + "\n")
        out.flush()


def _run_case(work: Path, seed: int, number: int) -> dict[str, object]:
    case, begun, finding = cases.Case(work, seed, number), time.monotonic(), None
    folder = Path(tempfile.mkdtemp(dir=work))
    before = sys.getrecursionlimit()
    try:
        case.run(folder)
    except BaseException as error:  # noqa: BLE001  a panic of a Rust library is not an `Exception`
        frames = traceback.extract_tb(error.__traceback__)
        at = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:1:-1][:6])
        finding = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} at {at}"
        del error
    if sys.getrecursionlimit() != before:
        finding = finding or "the recursion limit has changed"
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "number": number,
        "what": case.what,
        "outcomes": case.outcomes,
        "finding": finding,
        "seconds": time.monotonic() - begun,
    }
