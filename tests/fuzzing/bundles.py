"""Fuzzer of bundles and checkpoints: `python -m tests.fuzzing.bundles --count 2000 --seed 1`.

Each case changes part of a bundle or checkpoint, with correct hashes, and then opens it, runs it with our kernels and with
onnxruntime's, generates, or exports it. The result must be a completion or a one-line `EdgelmError` within
`CASE_TIMEOUT_S`. A signal, another exception, a panic, a warning or a hang is a finding; `--only N` runs case N again.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from . import HELPERS, cases

CASE_TIMEOUT_S = 20.0
"""Time limit of a case."""
START_TIMEOUT_S = 60.0
"""Time limit for the start of a child process."""
MAX_CASES_PER_CHILD = 200
"""A new child process is started then: loaded kernels stay in memory until the process ends."""
MAX_MEMORY_MB = 2500.0
"""Memory limit of a child process."""


@dataclass
class Report:
    """Results of a run."""

    done: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    slowest: list[tuple[float, int, str]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        slow = "; ".join(
            f"{number} {seconds:.1f} s {what[:50]}" for seconds, number, what in sorted(self.slowest)[:-6:-1]
        )
        lines = [
            f"{self.done} cases in {self.seconds:.0f} s, {self.answered} with an answer",
            f"{dict(self.kinds)}",
            f"slowest: {slow}",
        ]
        return "\n".join([*lines, f"{len(self.findings)} findings", *self.findings])


class Child:
    """A child process that runs cases."""

    def __init__(self, work: Path, seed: int, before: str = "") -> None:
        program = f"{before}\nimport sys, pathlib; from tests.fuzzing import child\nchild.main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
        command = [sys.executable, "-c", program, str(work), str(seed)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=Path(HELPERS).parents[1]
        )
        ready = self._read_line(START_TIMEOUT_S)
        if isinstance(ready, str):
            raise RuntimeError(f"a child {ready}")

    def ask(self, number: int) -> dict[str, Any] | str:
        """Return a case's result, or the reason why the child ended; then it must not be used again."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"%d\n" % number)
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._describe_exit()
        return self._read_line(CASE_TIMEOUT_S)

    def _read_line(self, max_seconds: float) -> dict[str, Any] | str:
        output = self._process.stdout
        assert output is not None
        deadline = time.monotonic() + max_seconds
        while not select.select([output], [], [], 0.25)[0]:
            if self._memory_mb() > MAX_MEMORY_MB:
                self.close()
                return f"takes more than {MAX_MEMORY_MB:.0f} MB"
            if time.monotonic() > deadline:
                self._process.send_signal(signal.SIGABRT)  # faulthandler writes a traceback
                time.sleep(0.5)
                trace = self._read_traceback()
                self.close()
                return f"takes longer than {max_seconds:.0f} s: {trace}"
        line = output.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        return self._describe_exit()

    def _describe_exit(self) -> str:
        code = self._process.wait()
        trace = self._read_traceback()
        self.close()
        return f"ends with {signal.Signals(-code).name if code < 0 else code}: {trace}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _memory_mb(self) -> float:
        try:
            return psutil.Process(self._process.pid).memory_info().rss / 1e6
        except psutil.Error:
            return 0.0

    def _read_traceback(self) -> str:
        """Return the first and last lines of the child's traceback."""
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").splitlines()
        places = [line.strip().replace('File "', "") for line in lines if line.strip() and "runpy" not in line]
        own = [place for place in places if not place.startswith(("Extension modules", "<frozen"))]
        return " | ".join(place[-110:] for place in [*own[:12], "...", *own[-8:]] if place)


def run(
    work: Path,
    numbers: range,
    seed: int,
    *,
    max_seconds: float = float("inf"),
    kinds: str = "",
    before: str = "",
    verbose: bool = False,
) -> Report:
    """Run the cases whose kind matches the regular expression `kinds`, for at most `max_seconds`.

    `work` is the folder from `cases.prepare`; each child first executes the code `before`.
    """
    report, child = Report(), None
    begun = reported = time.monotonic()
    for number in numbers:
        if time.monotonic() - begun > max_seconds:
            break
        if not re.fullmatch(kinds or ".*", cases.Case(work, seed, number).kind):
            continue
        if child is not None and report.done % MAX_CASES_PER_CHILD == 0:
            child.close()
            child = None
        child = child or Child(work, seed, before)
        outcome = child.ask(number)
        report.done += 1
        if isinstance(outcome, str):
            child = None
            finding, what = outcome, cases.Case(work, seed, number).kind
        else:
            finding, what = outcome["finding"], outcome["what"]
            report.slowest.append((outcome["seconds"], number, what))
            report.answered += any(each.endswith("answers") for each in outcome["outcomes"])
        report.kinds[what.split(" of ")[0]] += 1
        if finding:
            report.findings.append(f"case {number} ({what}): {finding}")
            print(report.findings[-1], flush=True)
        if verbose:
            print(number, outcome, flush=True)
        if time.monotonic() > reported + 60:
            reported = time.monotonic()
            print(f"{report.done} done, {len(report.findings)} findings", flush=True)
    if child is not None:
        child.close()
    report.seconds = time.monotonic() - begun
    return report


def main() -> int:
    """Run the fuzzer as a command; return 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--kinds", default="", help="only kinds that match a regular expression")
    parser.add_argument("--only", type=int, nargs="+", help="run these cases and show their results")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the child processes too
    with tempfile.TemporaryDirectory(prefix="edgelm-fuzz-") as folder:
        work = Path(folder) / "work"
        cases.prepare(work)
        if given.only is not None:
            for number in given.only:
                run(work, range(number, number + 1), given.seed, verbose=True)
            return 0
        report = run(work, range(given.first, given.first + given.count), given.seed, kinds=given.kinds)
    print(report)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
