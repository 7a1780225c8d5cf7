"""Profiles a step: the same steps are timed without and with onnxruntime's profile. Prints nothing."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from edgelm.bench.benchmark import open_for_benchmark
from edgelm.bench.memory_bandwidth import measure_bandwidth_gb_s
from edgelm.bench.trace import GraphRun, StepProfile, parse_runs, summarize_steps
from edgelm.bundle.manifest import Manifest
from edgelm.errors import EdgelmError
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.runtime.ort import resolve_thread_settings
from edgelm.runtime.runner import Runner, open_runner
from edgelm.system.board_cache import BoardCache

DECODE_STEPS: Final = 32
"""Largest number of measured decode steps: enough for a median, and the context hardly grows."""
WARMUP_STEPS: Final = 3
"""Decode steps before the measured ones."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Prefill of a prompt, or decode of a batch. Times are medians over the steps, or sums of medians."""

    name: Literal["prefill", "decode"]
    batch: int
    tokens: int
    """Tokens per row that a step computes."""
    context: int
    """Positions filled before the first step."""
    steps: int
    plain_us: float
    """A step without profiling."""
    outside_us: float
    """Time of a profiled step outside the graph's runs, in Python."""
    typical_step: StepProfile

    @property
    def step_us(self) -> float:
        """A typical profiled step: nodes, time between nodes, and Python."""
        return self.typical_step.run_us + self.outside_us

    def to_dict(self) -> dict[str, object]:
        """Return the object that `--json` prints; shares are of the nodes' time."""
        typical = self.typical_step
        operators = [
            {
                "operator": each.operator,
                "shape": None if each.shape is None else list(each.shape),
                "bits": each.bits,
                "nodes": round(each.nodes, 3),
                "us": round(each.us, 3),
                "share": round(typical.share(each.us), 6),
                "us_each": round(each.us_each, 3),
                "gb_s": None if each.gb_s is None else round(each.gb_s, 3),
                "gflop_s": None if each.gflop_s is None else round(each.gflop_s, 3),
            }
            for each in typical.operators
        ]
        layers = typical.parts and [
            {
                "part": each.name,
                "nodes": round(each.nodes, 3),
                "us": round(each.us, 3),
                "share": round(typical.share(each.us), 6),
            }
            for each in typical.parts
        ]
        times = {
            "plain_us": self.plain_us,
            "step_us": self.step_us,
            "run_us": typical.run_us,
            "nodes_us": typical.nodes_us,
            "between_us": typical.between_us,
            "outside_us": self.outside_us,
        }
        return {
            "phase": self.name,
            "batch": self.batch,
            "tokens": self.tokens,
            "context": self.context,
            "steps": self.steps,
            **{name: round(value, 3) for name, value in times.items()},
            "operators": operators,
            "layers": layers,
        }


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """Results of `edgelm bench --profile`."""

    threads: int
    memory_bandwidth_gb_s: float
    phases: tuple[Phase, ...]
    """Prefill of one row, then decode of each batch size."""

    def to_dict(self) -> dict[str, object]:
        """Return the object that `--json` prints."""
        return {
            "threads": self.threads,
            "memory_bandwidth_gb_s": round(self.memory_bandwidth_gb_s, 2),
            "phases": [phase.to_dict() for phase in self.phases],
        }


def profile_bundle(
    path: str,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 128,
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    repeat: int = 5,
    cache: BoardCache | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ProfileReport:
    """Profile `repeat` prefills of random tokens, and min(`new_tokens`, `DECODE_STEPS`) steps of each batch size.

    Everything runs twice, first in a runner without profiling. Raises `EdgelmError` as `benchmark` does, and if
    onnxruntime's profile lacks some of the runs.
    """
    bundle = open_for_benchmark(path, prompt_tokens, new_tokens, batches, repeat, cache)
    steps = min(new_tokens, DECODE_STEPS)
    context = prompt_tokens + steps
    prompt = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, prompt_tokens, dtype=np.int64)
    has_run_per_row = bundle.manifest.cache.kind == "growing"

    def measure(name: str, runner: Runner) -> list[_PhaseTimes]:
        phases = [_prefill(runner, prompt, repeat)]
        for number, batch in enumerate(batches):
            if progress is not None:
                progress(name, number + 1, len(batches) + 1)
            phases.append(_decode(runner, batch, prompt_tokens, steps, batch if has_run_per_row else 1))
        return phases

    def open_with_profile(prefix: Path | None) -> Runner:
        return open_runner(
            bundle, rows=max(batches), threads=threads, context=context, cache=cache, profile_prefix=prefix
        )

    plain = measure("plain", open_with_profile(None))
    with tempfile.TemporaryDirectory(prefix="edgelm-profile-") as folder:
        runner = open_with_profile(Path(folder) / "runs")
        profiled = measure("profiled", runner)
        with runner.end_profile().open(encoding="utf-8") as lines:
            runs = parse_runs(_events(lines))
    expected = sum(phase.runs * (phase.warmup_steps + len(phase.us)) for phase in profiled)
    if len(runs) != expected:
        raise EdgelmError(
            f"onnxruntime's profile has {len(runs)} of {expected} runs (its limit is a million events):"
            " reduce --new-tokens, --batch or --repeat"
        )
    following = iter(runs)
    phases = [_phase(*pair, following, bundle.manifest) for pair in zip(plain, profiled, strict=True)]
    count = resolve_thread_settings(bundle, threads, cache).threads
    return ProfileReport(count, measure_bandwidth_gb_s(count), tuple(phases))


@dataclass(frozen=True, slots=True)
class _PhaseTimes:
    """Measured steps of one phase in one runner."""

    name: Literal["prefill", "decode"]
    batch: int
    tokens: int
    context: int
    runs: int
    """Runs of the graph per step."""
    warmup_steps: int
    """Steps before the measured ones."""
    us: list[float] = field(default_factory=list)


def _prefill(runner: Runner, prompt: NDArray[np.int64], repeat: int) -> _PhaseTimes:
    starts = range(0, len(prompt), PREFILL_CHUNK)
    timed = _PhaseTimes("prefill", 1, len(prompt), 0, len(starts), 1)
    for number in range(repeat + 1):
        begun = time.perf_counter()
        for at in starts:
            runner.prefill(0, prompt[at : at + PREFILL_CHUNK], at)
        if number:
            timed.us.append(1e6 * (time.perf_counter() - begun))
    return timed


def _decode(runner: Runner, batch: int, context: int, steps: int, runs: int) -> _PhaseTimes:
    """Decode copies of row 0, whose first `context` positions are filled."""
    timed = _PhaseTimes("decode", batch, 1, context, runs, WARMUP_STEPS)
    for row in range(1, batch):
        runner.copy_row(0, row, context)
    tokens = np.zeros(batch, np.int64)
    lengths = np.full(batch, context, np.int32)
    for number in range(-WARMUP_STEPS, steps):
        lengths[:] = context + max(number, 0)
        begun = time.perf_counter()
        logits = runner.decode(tokens, lengths)
        if number >= 0:
            timed.us.append(1e6 * (time.perf_counter() - begun))
        tokens[:] = logits.argmax(axis=1)
    return timed


def _phase(plain: _PhaseTimes, profiled: _PhaseTimes, runs: Iterator[GraphRun], manifest: Manifest) -> Phase:
    """Consume the runs of one phase, and summarize those of the measured steps."""
    steps = [list(islice(runs, profiled.runs)) for _ in range(profiled.warmup_steps + len(profiled.us))][
        profiled.warmup_steps :
    ]
    outside = [wall - sum(run.us for run in step) for wall, step in zip(profiled.us, steps, strict=True)]
    return Phase(
        profiled.name,
        profiled.batch,
        profiled.tokens,
        profiled.context,
        len(profiled.us),
        median(plain.us),
        median(outside),
        summarize_steps(steps, manifest),
    )


def _events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the events of a profile, a JSON array with one event per line, without holding all of it in memory."""
    for line in lines:
        text = line.strip().rstrip(",")
        if text not in ("", "[", "]"):
            yield json.loads(text)
