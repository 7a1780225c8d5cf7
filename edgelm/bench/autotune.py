"""Which thread settings decode a bundle fastest on this board. Prints nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgelm.bundle.bundle_folder import Bundle
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.runtime.ort import cache_key
from edgelm.runtime.prepack import open_verified
from edgelm.runtime.runner import open_runner
from edgelm.runtime.threads import ThreadSettings, count_cores, save_tuning
from edgelm.system.board_cache import BoardCache

MAX_THREADS: Final = 8
"""More than this never helped a model of this size."""
STEPS: Final = 32
ROUNDS: Final = 3
TIE_RATIO: Final = 1.03
"""Settings slower than the best by less than this are as good: the one that wakes fewest cores is taken."""


@dataclass(frozen=True, slots=True)
class TuningResult:
    """A setting and its medians over all rounds, in tokens a second."""

    tuning: ThreadSettings
    decode_tok_s: float
    prefill_tok_s: float


def tune(
    path: str, cache: BoardCache, progress: Callable[[str, int, int], None] | None = None
) -> tuple[tuple[TuningResult, ...], ThreadSettings, bool]:
    """Try every number of threads, waiting actively and not, in turns.

    Returns all trials, the best setting, and whether it could be kept: `open_runner` then takes it where no number of
    threads is asked for. Raises `BundleError` as `edgelm.load` does.
    """
    bundle = open_verified(path, cache)
    settings = [
        ThreadSettings(threads, spin)
        for threads in range(1, min(count_cores(), MAX_THREADS) + 1)
        for spin in (True, False)
    ]
    settings.remove(ThreadSettings(1, spin=False))  # one thread waits for nobody
    times: dict[ThreadSettings, list[tuple[float, float]]] = {setting: [] for setting in settings}
    for turn in range(ROUNDS):
        for number, setting in enumerate(settings):
            if progress is not None:
                progress("setting", turn * len(settings) + number, ROUNDS * len(settings))
            times[setting].append(_measure(bundle, setting, cache))
    trials = tuple(_summary(setting, found) for setting, found in times.items())
    best = choose_fastest(trials)
    return trials, best, save_tuning(cache, cache_key(bundle, "tuning"), best, str(bundle.path))


def choose_fastest(trials: tuple[TuningResult, ...]) -> ThreadSettings:
    """Return the setting that decodes fastest; of those alike, the one with fewest threads, idle ones asleep."""
    most = max(trial.decode_tok_s for trial in trials)
    alike = [trial.tuning for trial in trials if trial.decode_tok_s * TIE_RATIO >= most]
    return min(alike, key=lambda tuning: (tuning.threads, tuning.spin))


def _measure(bundle: Bundle, setting: ThreadSettings, cache: BoardCache) -> tuple[float, float]:
    """Return the median seconds of a decoding step and of a prompt token."""
    prompt = min(PREFILL_CHUNK // 2, bundle.manifest.context // 2)
    steps = min(STEPS, bundle.manifest.context - prompt)
    runner = open_runner(
        bundle, rows=1, threads=setting.threads, spin=setting.spin, context=prompt + steps, cache=cache
    )
    tokens = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, prompt, dtype=np.int64)
    runner.prefill(0, tokens, 0)  # the first one allocates
    begun = time.perf_counter()
    newest = runner.prefill(0, tokens, 0).argmax(axis=1)
    prefill_s = time.perf_counter() - begun
    times = []
    for length in range(prompt, prompt + steps):
        begun = time.perf_counter()
        newest = runner.decode(newest, np.array([length], np.int32)).argmax(axis=1)
        times.append(time.perf_counter() - begun)
    return statistics.median(times), prefill_s / max(prompt, 1)


def _summary(setting: ThreadSettings, found: list[tuple[float, float]]) -> TuningResult:
    decode, prefill = (1 / statistics.median(times) for times in zip(*found, strict=True))
    return TuningResult(setting, decode, prefill)
