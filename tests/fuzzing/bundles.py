"""Changed bundles and checkpoints: `python -m tests.fuzzing.bundles --count 2000 --seed 1`, by hand.

Each is a file of some kind with a part that a stranger may have written, whose hashes are right: opened, computed with our
kernels and with onnxruntime's, asked for an answer, or exported. It must come to an answer or an `EdgelmError` of one line
within `MOST_S`. A signal, another exception, a panic, a warning or a hang is a finding; `--only N` runs its case again.
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

MOST_S = 20.0
"""How long a case may take."""
START_S = 60.0
"""How long a child may take to load what it needs."""
MOST_CASES = 200
"""Of a child: graphs keep the kernels that they were loaded with for as long as the process lives."""
MOST_MB = 2500.0
"""How much memory a child may come to have."""


@dataclass
class Report:
    """What a run found."""

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
    """A process that runs cases."""

    def __init__(self, work: Path, seed: int, before: str = "") -> None:
        program = f"{before}\nimport sys, pathlib; from tests.fuzzing import child\nchild.main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
        command = [sys.executable, "-c", program, str(work), str(seed)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=Path(HELPERS).parents[1]
        )
        ready = self._line(START_S)
        if isinstance(ready, str):
            raise RuntimeError(f"a child {ready}")

    def ask(self, number: int) -> dict[str, Any] | str:
        """Return a case's outcome, or what ended the child; it cannot be asked again then."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"%d\n" % number)
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        return self._line(MOST_S)

    def _line(self, most_s: float) -> dict[str, Any] | str:
        answered = self._process.stdout
        assert answered is not None
        until = time.monotonic() + most_s
        while not select.select([answered], [], [], 0.25)[0]:
            if self._memory_mb() > MOST_MB:
                self.close()
                return f"takes more than {MOST_MB:.0f} MB"
            if time.monotonic() > until:
                self._process.send_signal(signal.SIGABRT)  # so that it says where it is
                time.sleep(0.5)
                said = self._said()
                self.close()
                return f"takes longer than {most_s:.0f} s: {said}"
        line = answered.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        return self._ended()

    def _ended(self) -> str:
        code = self._process.wait()
        said = self._said()
        self.close()
        return f"ends with {signal.Signals(-code).name if code < 0 else code}: {said}"

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _memory_mb(self) -> float:
        try:
            return psutil.Process(self._process.pid).memory_info().rss / 1e6
        except psutil.Error:
            return 0.0

    def _said(self) -> str:
        """Return the last places that it was in."""
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
    most_s: float = float("inf"),
    kinds: str = "",
    before: str = "",
    verbose: bool = False,
) -> Report:
    """Run cases, of kinds that match a regular expression, for `most_s` seconds at most.

    `work` is what `cases.prepare` made; `before` is run in each child first.
    """
    report, child = Report(), None
    begun = said = time.monotonic()
    for number in numbers:
        if time.monotonic() - begun > most_s:
            break
        if not re.fullmatch(kinds or ".*", cases.Case(work, seed, number).kind):
            continue
        if child is not None and report.done % MOST_CASES == 0:
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
            report.answered += any(each.endswith("answers") for each in outcome["said"])
        report.kinds[what.split(" of ")[0]] += 1
        if finding:
            report.findings.append(f"case {number} ({what}): {finding}")
            print(report.findings[-1], flush=True)
        if verbose:
            print(number, outcome, flush=True)
        if time.monotonic() > said + 60:
            said = time.monotonic()
            print(f"{report.done} done, {len(report.findings)} findings", flush=True)
    if child is not None:
        child.close()
    report.seconds = time.monotonic() - begun
    return report


def main() -> int:
    """Run the fuzzer as a command; return 1 where it found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--kinds", default="", help="only kinds that match a regular expression")
    parser.add_argument("--only", type=int, nargs="+", help="run these cases and show what they come to")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it started is ended too
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
