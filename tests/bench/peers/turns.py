"""Measuring: every measurement a process of its own, all sides in turn, round by round."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.bench.peers.building import SCRIPTS, Failed, environment, reason
from tests.bench.peers.shapes import Facts
from tests.bench.peers.sides import Side

LOAD: Final = "load"
"""The unmeasured first load."""

MEASURES: Final[dict[str, dict[str, Any]]] = {
    "context-16": {"what": "answers", "lengths": [16, 32]},
    "context-256": {"what": "answers", "lengths": [256]},
    "context-1024": {"what": "answers", "lengths": [1024]},
    "warm": {"what": "warm", "known": 200, "new": 10},
    "streams": {"what": "streams", "streams": [1, 2, 4, 8], "stream_prompt": 32},
    "memory": {"what": "memory"},
}
"""What a process measures, by name: prompts of some lengths and what follows them, or what job.py says."""

CONTEXT: Final = 2048
"""Positions a side holds, or as many as the checkpoint has."""

SLOW_TOKENS, SLOW_REPEATS = 16, 1

BUSY: Final = 0.1
"""Share of the processors' time taken by others from which on a machine is not quiet: whoever lets its threads wait for
each other in busy loops loses most there."""

LIMIT_S: Final = 1800
"""Longest a measurement may take."""

IMPORTS: Final = {
    "edgelm": "from edgelm import load",
    "llama_cpp": "import llama_cpp",
    "genai": "import onnxruntime_genai",
    "optimum": "from optimum.onnxruntime import ORTModelForCausalLM",
    "transformers": "from transformers import AutoModelForCausalLM",
}
"""What has to be imported to load a model: edgelm and transformers bring no more than is asked for."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured, by how many threads."""

    threads: int
    new_tokens: int
    repeats: int


def ask(python: str, side: Side, job: dict[str, Any], work: Path) -> dict[str, Any]:
    """Have a side do a job; return what it says. Raises `Failed`."""
    command = [python, str(SCRIPTS / side.script), json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment(work))
    except subprocess.TimeoutExpired:
        raise Failed(f"took longer than {LIMIT_S} s") from None
    if done.returncode:
        raise Failed(reason(done.stderr) if done.returncode > 0 else f"ended by signal {-done.returncode}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def job_of(measure: str, side: Side, model: str, facts: Facts, settings: Settings, seed: int) -> dict[str, Any] | None:
    """Return the job of a measure, or nothing where the model's context is too short for it."""
    context = min(CONTEXT, facts.context)
    count = SLOW_TOKENS if side.slow else settings.new_tokens
    job = MEASURES["memory" if measure == LOAD else measure] | {
        "model": model,
        "threads": settings.threads,
        "context": context,
        "seed": seed,
        "new_tokens": count,
        "repeats": SLOW_REPEATS if side.slow else settings.repeats,
        **side.job,
    }
    if "lengths" in job:
        job["lengths"] = [length for length in job["lengths"] if length + count <= context]
        return job if job["lengths"] else None
    return job


def import_s(python: str, program: str, work: Path) -> float:
    """Return the seconds that a program's import adds to starting the interpreter."""
    taken = []
    for line in ("pass", IMPORTS[program]):
        started = time.perf_counter()
        subprocess.run([python, "-c", line], check=True, env=environment(work), stderr=subprocess.DEVNULL)
        taken.append(time.perf_counter() - started)
    return taken[1] - taken[0]


def bandwidth_gb_s(threads: int, work: Path) -> float:
    """Measure the machine's read bandwidth in a process of its own."""
    line = f"from edgelm.bench.memory_bandwidth import measure_bandwidth_gb_s as m; print(m({threads}, 2.0))"
    done = subprocess.run(
        [sys.executable, "-c", line], check=True, env=environment(work), capture_output=True, text=True
    )
    return float(done.stdout)


def busy_share(seconds: float = 2.0) -> float:
    """Return the share of the processors' time that others take: nothing of the comparison runs meanwhile."""

    def ticks() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all, and those idle or waiting for a disk

    total, idle = ticks()
    time.sleep(seconds)
    later, idle_later = ticks()
    return 1 - (idle_later - idle) / max(1, later - total)


def summary(said: dict[str, Any]) -> dict[str, float]:
    """Return the figures of one measurement, medians of its repeats, by name."""
    figures = {name: said[name] for name in ("private_mb", "mapped_mb", "resident_mb", "peak_mb") if name in said}
    if "peak_mb" in said:
        figures |= {"load_s": said["load_s"], "ready_s": said["load_s"] + said["first_s"]}
    for length, runs in said.get("answers", {}).items():
        for rate in ("prefill", "decode"):
            figures[f"{rate} {length}"] = statistics.median(run[f"{rate}_tok_s"] for run in runs)
    for name in ("cold_ms", "warm_ms"):
        if name in said:
            figures[name] = statistics.median(said[name])
    for streams, rates in said.get("streams", {}).items():
        figures[f"streams {streams}"] = statistics.median(rates)
    return figures


@dataclass
class Turns:
    """The rounds of one checkpoint."""

    facts: Facts
    settings: Settings
    sides: dict[str, Side]
    models: dict[str, str]
    read_mb: dict[str, float]
    """Side -> MB of weights read for each token."""
    pythons: dict[str, str]
    measures: list[str]
    work: Path
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    """Side -> measure -> why it has no figures; it is not tried again. Whoever cannot be loaded is left out of all."""
    versions: dict[str, str] = field(default_factory=dict)

    def warm_up(self) -> None:
        """Load every side once: caches fill, and what cannot run at all shows."""
        for name in self._able():
            self._measure(LOAD, name, 0)

    def round(self, number: int) -> dict[str, Any]:
        """Measure everything once, the order turned round every other time."""
        figures: dict[str, dict[str, float]] = {name: {} for name in self._able()}
        busy = busy_share()
        if busy > BUSY:
            print(f"others take {busy:.0%} of the processors: these figures say little", file=sys.stderr, flush=True)
        bandwidth = bandwidth_gb_s(self.settings.threads, self.work)
        for measure in self.measures:
            print(measure, file=sys.stderr, flush=True)
            self._in_turn(number, lambda name, m=measure: figures[name].update(self._measure(m, name, number)))
        imports: dict[str, float] = {}

        def add_import(name: str) -> None:
            program = self.sides[name].program
            if program not in imports:
                imports[program] = import_s(self.pythons[program], program, self.work)
            figures[name]["import_s"] = imports[program]

        self._in_turn(number, add_import)
        for name, found in figures.items():
            found.update(self._shares(name, found, bandwidth))
        return {"bandwidth_gb_s": bandwidth, "busy": busy, "sides": figures}

    def _able(self) -> list[str]:
        return [name for name in self.sides if LOAD not in self.failed.get(name, {})]

    def _in_turn(self, number: int, do: Callable[[str], None]) -> None:
        names = self._able()
        for name in names if number % 2 else names[::-1]:
            do(name)

    def _measure(self, measure: str, name: str, seed: int) -> dict[str, float]:
        side = self.sides[name]
        if measure in self.failed.get(name, {}):
            return {}
        job = job_of(measure, side, self.models[name], self.facts, self.settings, seed)
        if job is None:
            return {}
        try:
            said = ask(self.pythons[side.program], side, job, self.work)
            self.versions[side.program] = said["version"]
            return summary(said)
        except Failed as failure:
            print(f"{name}, {measure}: {failure}", file=sys.stderr, flush=True)
            self.failed.setdefault(name, {})[measure] = str(failure)
            return {}

    def _shares(self, name: str, found: dict[str, float], bandwidth: float) -> dict[str, float]:
        """Return the share of the bandwidth that each decode takes: weights once a token, and the cache so far."""
        shares = {}
        for key in [key for key in found if key.startswith("decode ")]:
            length = int(key.split()[1]) + self.settings.new_tokens / 2
            cache = self.facts.cache_values * self.sides[name].cache_bytes * length
            shares[f"share {key.split()[1]}"] = found[key] * (self.read_mb[name] * 1e6 + cache) / (bandwidth * 1e9)
        return shares
