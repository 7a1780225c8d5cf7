"""Measures a bundle on this machine: prefill, decode, time to first token, sampler, memory. Prints nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgelm.bench.memory_bandwidth import measure_bandwidth_gb_s
from edgelm.bundle.bundle_folder import Bundle
from edgelm.errors import EdgelmError
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.runtime.ort import resolve_thread_settings
from edgelm.runtime.prepack import open_verified
from edgelm.runtime.runner import Runner, open_runner
from edgelm.sampling import Sampler
from edgelm.system.board_cache import BoardCache
from edgelm.system.memory import measure_memory_mb
from edgelm.types import SamplingParams

SAMPLER_ROUNDS: Final = 50


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, minimum and maximum of the repeats."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Results of one batch size. Rates are tokens per second of the whole batch.

    `bandwidth_share` is the share of the measured memory bandwidth that decoding uses, in [0, 1].
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tok_s: Spread
    decode_tok_s: Spread
    ttft_ms: Spread
    bandwidth_share: float

    def to_dict(self) -> dict[str, float]:
        """Return the medians, and minimum and maximum of the decode rate."""
        return {
            "batch": self.batch,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "prefill_tok_s": round(self.prefill_tok_s.median, 2),
            "decode_tok_s": round(self.decode_tok_s.median, 2),
            "decode_tok_s_min": round(self.decode_tok_s.minimum, 2),
            "decode_tok_s_max": round(self.decode_tok_s.maximum, 2),
            "ttft_ms": round(self.ttft_ms.median, 3),
            "bandwidth_share": round(self.bandwidth_share, 4),
        }


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """Results of `edgelm bench`. The unit ends each name; memory is in MB (10^6 bytes)."""

    threads: int
    memory_bandwidth_gb_s: float
    load_s: float
    sampler_us: float
    memory: dict[str, float]
    runs: tuple[BatchResult, ...]

    def to_dict(self) -> dict[str, object]:
        """Return the object that `--json` prints."""
        return {
            "threads": self.threads,
            "memory_bandwidth_gb_s": round(self.memory_bandwidth_gb_s, 2),
            "load_s": round(self.load_s, 4),
            **{name: round(value, 2) for name, value in self.memory.items()},
            "sampler_us": round(self.sampler_us, 2),
            "runs": [run.to_dict() for run in self.runs],
        }


def benchmark(
    path: str,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 128,
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    repeat: int = 5,
    cache: BoardCache | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchmarkReport:
    """Measure a bundle with random tokens, after one warm-up round per batch size.

    With a `cache`, prepacked weights are mapped, and the default of `threads` is the tuned setting. Raises
    `EdgelmError` if prompt and new tokens do not fit the context, or a number is not positive.
    """
    start = time.perf_counter()
    bundle = open_for_benchmark(path, prompt_tokens, new_tokens, batches, repeat, cache)
    count = resolve_thread_settings(bundle, threads, cache).threads
    runner = open_runner(bundle, rows=max(batches), threads=threads, context=prompt_tokens + new_tokens, cache=cache)
    load_s = time.perf_counter() - start
    rounds = {
        batch: [
            _round(runner, bundle, batch, prompt_tokens, new_tokens)
            for _ in _report_rounds(repeat + 1, number, len(batches), progress)
        ][1:]
        for number, batch in enumerate(batches)
    }
    memory = measure_memory_mb()  # before numba and the bandwidth measurement add to it
    bandwidth = measure_bandwidth_gb_s(count)
    runs = [_summarize(bundle, batch, prompt_tokens, new_tokens, rounds[batch], bandwidth) for batch in batches]
    return BenchmarkReport(count, bandwidth, load_s, _sampler_us(bundle.manifest.vocab_size), memory, tuple(runs))


def open_for_benchmark(
    path: str, prompt_tokens: int, new_tokens: int, batches: Sequence[int], repeat: int, cache: BoardCache | None
) -> Bundle:
    """Check the numbers and open the bundle. Raises `EdgelmError` as `benchmark` does."""
    for name, value in (
        ("prompt tokens", prompt_tokens),
        ("new tokens", new_tokens),
        ("repeat", repeat),
        *(("batch", b) for b in batches),
    ):
        if value < 1:
            raise EdgelmError(f"{name} must be at least 1, got {value}")
    bundle = open_verified(path, cache)
    if prompt_tokens + new_tokens > bundle.manifest.context:
        raise EdgelmError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new tokens do not fit the context of"
            f" {bundle.manifest.context}"
        )
    return bundle


def _report_rounds(
    repeat: int, number: int, of: int, progress: Callable[[str, int, int], None] | None
) -> Iterator[int]:
    for index in range(repeat):
        if progress is not None:
            progress("round", number * repeat + index, of * repeat)
        yield index


@dataclass(frozen=True, slots=True)
class _Times:
    prefill_s: float
    ttft_s: float
    decode_s: float


def _round(runner: Runner, bundle: Bundle, batch: int, prompt_tokens: int, new_tokens: int) -> _Times:
    """Prefill every row, then decode them together."""
    generator = np.random.default_rng(0)
    prompts = generator.integers(0, bundle.manifest.vocab_size, (batch, prompt_tokens), dtype=np.int64)
    tokens = np.zeros(batch, np.int64)
    ttft_s = 0.0
    start = time.perf_counter()
    for row in range(batch):
        for at in range(0, prompt_tokens, PREFILL_CHUNK):
            logits = runner.prefill(row, prompts[row, at : at + PREFILL_CHUNK], at)
        tokens[row] = logits[0].argmax()
        ttft_s = ttft_s or time.perf_counter() - start
    middle = time.perf_counter()
    lengths = np.full(batch, prompt_tokens, np.int32)
    for _ in range(new_tokens):
        tokens[:] = runner.decode(tokens, lengths).argmax(axis=1)
        lengths += 1
    return _Times(middle - start, ttft_s, time.perf_counter() - middle)


def _summarize(
    bundle: Bundle, batch: int, prompt_tokens: int, new_tokens: int, rounds: Sequence[_Times], bandwidth: float
) -> BatchResult:
    decode = Spread.from_values([batch * new_tokens / times.decode_s for times in rounds])
    manifest = bundle.manifest
    weights = sum(matrix.bytes() for matrix in manifest.matrices if matrix.name != "embedding" or _is_tied(bundle))
    cache = batch * manifest.cache.bytes_per_token() * (prompt_tokens + new_tokens / 2)
    steps_per_s = decode.median / batch
    return BatchResult(
        batch,
        prompt_tokens,
        new_tokens,
        Spread.from_values([batch * prompt_tokens / times.prefill_s for times in rounds]),
        decode,
        Spread.from_values([1e3 * times.ttft_s for times in rounds]),
        steps_per_s * (weights + cache) / (bandwidth * 1e9),
    )


def _is_tied(bundle: Bundle) -> bool:
    """Whether the embedding is also the head: then every step reads all of it."""
    return all(matrix.name != "head" for matrix in bundle.manifest.matrices)


def _sampler_us(vocab_size: int) -> float:
    """Return the median microseconds to sample a token with temperature, top-k and top-p."""
    sampler = Sampler(SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=1), vocab_size)
    logits = np.random.default_rng(0).normal(0, 3, vocab_size).astype(np.float32)
    history = np.zeros(0, np.int32)
    times = []
    for _ in range(SAMPLER_ROUNDS + 3):
        fresh = logits.copy()
        start = time.perf_counter()
        sampler.sample(fresh, None, history)
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times[3:])
