"""Finds the thread settings that decode a bundle fastest on this board. Prints nothing."""

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
"""More threads never helped models of a size for boards."""
STEPS: Final = 32
ROUNDS: Final = 3
TIE_RATIO: Final = 1.03
"""Settings within this ratio of the best one tie: the one that uses fewest cores is chosen."""


@dataclass(frozen=True, slots=True)
class TuningResult:
    """A setting with its median rates over all rounds, in tokens per second."""

    tuning: ThreadSettings
    decode_tok_s: float
    prefill_tok_s: float


def tune(
    path: str, cache: BoardCache, progress: Callable[[str, int, int], None] | None = None
) -> tuple[tuple[TuningResult, ...], ThreadSettings, bool]:
    """Measure every number of threads, each with and without spinning, in interleaved rounds.

    Returns all results, the best setting, and whether it was saved: `open_runner` then uses it unless a number of
    threads is given. Raises `BundleError` as `edgelm.load` does.
    """
    bundle = open_verified(path, cache)
    settings = [
        ThreadSettings(threads, spin)
        for threads in range(1, min(count_cores(), MAX_THREADS) + 1)
        for spin in (True, False)
    ]
    settings.remove(ThreadSettings(1, spin=False))  # one thread never waits
    times: dict[ThreadSettings, list[tuple[float, float]]] = {setting: [] for setting in settings}
    for round_number in range(ROUNDS):
        for number, setting in enumerate(settings):
            if progress is not None:
                progress("setting", round_number * len(settings) + number, ROUNDS * len(settings))
            times[setting].append(_measure(bundle, setting, cache))
    results = tuple(_summarize(setting, rounds) for setting, rounds in times.items())
    best = choose_fastest(results)
    return results, best, save_tuning(cache, cache_key(bundle, "tuning"), best, str(bundle.path))


def choose_fastest(results: tuple[TuningResult, ...]) -> ThreadSettings:
    """Return the setting that decodes fastest; of those that tie, the one with fewest threads and without spinning."""
    best = max(result.decode_tok_s for result in results)
    tied = [result.tuning for result in results if result.decode_tok_s * TIE_RATIO >= best]
    return min(tied, key=lambda tuning: (tuning.threads, tuning.spin))


def _measure(bundle: Bundle, setting: ThreadSettings, cache: BoardCache) -> tuple[float, float]:
    """Return the median seconds of a decode step and the seconds per prompt token."""
    prompt = min(PREFILL_CHUNK // 2, bundle.manifest.context // 2)
    steps = min(STEPS, bundle.manifest.context - prompt)
    runner = open_runner(
        bundle, rows=1, threads=setting.threads, spin=setting.spin, context=prompt + steps, cache=cache
    )
    tokens = np.random.default_rng(0).integers(0, bundle.manifest.vocab_size, prompt, dtype=np.int64)
    runner.prefill(0, tokens, 0)  # the first run allocates memory
    begun = time.perf_counter()
    newest = runner.prefill(0, tokens, 0).argmax(axis=1)
    prefill_s = time.perf_counter() - begun
    times = []
    for length in range(prompt, prompt + steps):
        begun = time.perf_counter()
        newest = runner.decode(newest, np.array([length], np.int32)).argmax(axis=1)
        times.append(time.perf_counter() - begun)
    return statistics.median(times), prefill_s / max(prompt, 1)


def _summarize(setting: ThreadSettings, rounds: list[tuple[float, float]]) -> TuningResult:
    decode, prefill = (1 / statistics.median(times) for times in zip(*rounds, strict=True))
    return TuningResult(setting, decode, prefill)
