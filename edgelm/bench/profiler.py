"""Where a step's time goes: the same steps timed without and with onnxruntime's profile. Prints nothing."""

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
from edgelm.bench.memory_bandwidth import memory_bandwidth_gb_s
from edgelm.bench.trace import GraphRun, StepProfile, parse_runs, summarize_steps
from edgelm.bundle.manifest import Manifest
from edgelm.errors import EdgelmError
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.runtime.ort import resolve_thread_settings
from edgelm.runtime.runner import Runner, open_runner
from edgelm.system.board_cache import BoardCache

DECODE_STEPS: Final = 32
"""Most decoding steps measured: enough for a median, few enough that the context hardly grows."""
WARMUP_STEPS: Final = 3
"""Decoding steps before the measured ones."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Prefill of a prompt, or decoding of a batch. Times are medians over the steps, or sums of medians."""

    name: Literal["prefill", "decode"]
    batch: int
    tokens: int
    """Tokens a step computes of each row."""
    context: int
    """Positions filled before the first step."""
    steps: int
    plain_us: float
    """A step where nothing is profiled."""
    outside_us: float
    """What Python takes of a profiled step around the graph's runs."""
    typical_step: StepProfile

    @property
    def step_us(self) -> float:
        """A typical step that is profiled: nodes, what lies between them, and Python."""
        return self.typical_step.run_us + self.outside_us

    def to_dict(self) -> dict[str, object]:
        """Return the phase as `--json` prints it; shares are of the nodes' time."""
        folded = self.typical_step
        operators = [
            {
                "operator": each.operator,
                "shape": None if each.shape is None else list(each.shape),
                "bits": each.bits,
                "nodes": round(each.nodes, 3),
                "us": round(each.us, 3),
                "share": round(folded.share(each.us), 6),
                "us_each": round(each.us_each, 3),
                "gb_s": None if each.gb_s is None else round(each.gb_s, 3),
                "gflop_s": None if each.gflop_s is None else round(each.gflop_s, 3),
            }
            for each in folded.operators
        ]
        layers = folded.parts and [
            {
                "part": each.name,
                "nodes": round(each.nodes, 3),
                "us": round(each.us, 3),
                "share": round(folded.share(each.us), 6),
            }
            for each in folded.parts
        ]
        times = {
            "plain_us": self.plain_us,
            "step_us": self.step_us,
            "run_us": folded.run_us,
            "nodes_us": folded.nodes_us,
            "between_us": folded.between_us,
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
    """Everything `edgelm bench --profile` shows."""

    threads: int
    memory_bandwidth_gb_s: float
    phases: tuple[Phase, ...]
    """Prefill of one row, then decoding of each batch."""

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
    """Profile `repeat` prefills of random tokens and, for each batch, up to `DECODE_STEPS` of its `new_tokens` steps.

    Everything runs twice, first in a runner without a profile. Raises `EdgelmError` as `benchmark` does, and where
    onnxruntime kept less of the profile than was run.
    """
    bundle = open_for_benchmark(path, prompt_tokens, new_tokens, batches, repeat, cache)
    steps = min(new_tokens, DECODE_STEPS)
    context = prompt_tokens + steps
    prompt = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, prompt_tokens, dtype=np.int64)
    has_run_per_row = bundle.manifest.cache.kind == "growing"

    def measured(what: str, runner: Runner) -> list[_PhaseTimes]:
        phases = [_prefill(runner, prompt, repeat)]
        for number, batch in enumerate(batches):
            if progress is not None:
                progress(what, number + 1, len(batches) + 1)
            phases.append(_decode(runner, batch, prompt_tokens, steps, batch if has_run_per_row else 1))
        return phases

    def opened(to: Path | None) -> Runner:
        return open_runner(bundle, rows=max(batches), threads=threads, context=context, cache=cache, profile_prefix=to)

    plain = measured("plain", opened(None))
    with tempfile.TemporaryDirectory(prefix="edgelm-profile-") as folder:
        runner = opened(Path(folder) / "runs")
        profiled = measured("profiled", runner)
        with runner.end_profile().open(encoding="utf-8") as lines:
            runs = parse_runs(_events(lines))
    expected = sum(phase.runs * (phase.warmup_steps + len(phase.us)) for phase in profiled)
    if len(runs) != expected:
        raise EdgelmError(
            f"onnxruntime's profile holds {len(runs)} of {expected} runs (it keeps a million events at most):"
            " ask for fewer --new-tokens, a smaller --batch or less to --repeat"
        )
    following = iter(runs)
    phases = [_phase(*pair, following, bundle.manifest) for pair in zip(plain, profiled, strict=True)]
    count = resolve_thread_settings(bundle, threads, cache).threads
    return ProfileReport(count, memory_bandwidth_gb_s(count), tuple(phases))


@dataclass(frozen=True, slots=True)
class _PhaseTimes:
    """Steps of one phase in one runner."""

    name: Literal["prefill", "decode"]
    batch: int
    tokens: int
    context: int
    runs: int
    """Runs of the graph in a step."""
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
    """Decode rows that all begin like row 0, whose first `context` positions are filled."""
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
    """Take a phase's runs and fold those of the measured steps."""
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
    """Read a profile, a JSON array that onnxruntime writes an event a line, without holding it in memory whole."""
    for line in lines:
        text = line.strip().rstrip(",")
        if text not in ("", "[", "]"):
            yield json.loads(text)
