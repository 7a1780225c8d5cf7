"""Sampling: its distribution, equality across machines and compilers, and imports."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import iter_modules

import naive_sampling
import numpy as np
import pytest

from edgelm.cli.flags import add_sampling_flags
from edgelm.errors import RequestError
from edgelm.sampling import Sampler, load_kernels, needs_kernels, steps
from edgelm.sampling.sampler import LOGIT_STEPS
from edgelm.types import RANGES, SamplingParams

CHAINS = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.0, "repetition_penalty": 1.5},
)


def make_logits(vocab_size: int, seed: int) -> np.ndarray:
    """Return logits computed by integer arithmetic, which are the same on every machine."""
    raw = np.random.PCG64(seed).random_raw(vocab_size) >> np.uint64(40)
    return (raw.astype(np.float64) / 2**24 * 12.0 - 6.0).astype(np.float32)


def choose_many() -> list[list[int]]:
    """Return the tokens of each chain with a mask and a history; the vocabulary is no multiple of a block."""
    chosen = []
    for chain in CHAINS:
        sampler = Sampler(SamplingParams(seed=11, **chain), 333)
        history = np.arange(0, 333, 3, dtype=np.int32)
        mask = np.full(11, 0x7FFFFFFF, dtype=np.uint32)
        chosen.append([sampler.sample(make_logits(333, row), mask, history) for row in range(8)])
    return chosen


EXPECTED = [
    [49, 167, 180, 15, 32, 316, 14, 41],
    [67, 169, 174, 15, 21, 321, 13, 27],
    [49, 167, 181, 15, 32, 316, 18, 41],
    [52, 167, 179, 15, 32, 316, 14, 41],
    [67, 169, 174, 21, 27, 313, 13, 19],
    [26, 169, 224, 260, 178, 296, 68, 295],
]
"""Made on x86-64 with Python 3.11. Every machine, interpreter and compiler must give the same."""


def test_the_same_seed_gives_these_tokens_everywhere() -> None:
    assert choose_many() == EXPECTED


def test_uncompiled_kernels_choose_the_same_tokens() -> None:
    here = Path(__file__).parent
    code = "import numba, test_sampling; assert numba.config.DISABLE_JIT; print(test_sampling.choose_many())"
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": f"{here}{os.pathsep}{here.parent / 'support'}"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(choose_many())


def test_greedy_loads_no_numba() -> None:
    code = """
import sys, numpy
from edgelm.types import SamplingParams
from edgelm.sampling import Sampler, load_kernels
logits = numpy.arange(40, dtype=numpy.float32)
sampler = Sampler(SamplingParams(logprobs=3), 40)
assert sampler.sample(logits) == 39
assert sampler.sample(logits, numpy.array([0x80000000, 0], dtype=numpy.uint32)) == 31
sampler.logprobs(logits, 3)
assert "numba" not in sys.modules
load_kernels()
assert "numba" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("chain", [chain for chain in CHAINS if chain["temperature"]])
def test_tokens_have_the_distribution_of_the_model(chain: dict[str, float]) -> None:
    """Pearson's chi-square over 20,000 draws; the bound is 5 standard deviations above its mean."""
    draws = 20_000
    params = SamplingParams(seed=2024, **chain)
    logits = make_logits(64, 99) / np.float32(2)
    history = np.array([1, 5, 9], dtype=np.int32)
    kept = naive_sampling.keep(naive_sampling.penalize(logits, history.tolist(), params.repetition_penalty), params)
    sampler = Sampler(params, 64)
    counts = np.zeros(64)
    for _ in range(draws):
        counts[sampler.sample(logits.copy(), None, history)] += 1
    assert set(np.flatnonzero(counts)) <= set(kept.probabilities)
    expected = {token: draws * probability for token, probability in kept.probabilities.items()}
    assert min(expected.values()) > 5, "too rare a token for the test to be valid"
    statistic = sum((counts[token] - mean) ** 2 / mean for token, mean in expected.items())
    freedom = len(expected) - 1
    assert freedom > 3
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_without_a_seed_two_requests_differ() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    rows = [[Sampler(SamplingParams(temperature=1.0), 1000).sample(logits) for _ in range(8)] for _ in range(2)]
    assert rows[0] != rows[1]


def test_draws_of_one_sampler_differ() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), 1000)
    assert len({sampler.sample(np.zeros(1000, dtype=np.float32)) for _ in range(20)}) > 15


@pytest.mark.parametrize("vocab_size", [0, -1, 2**22 + 1])
def test_vocabulary_size_is_checked(vocab_size: int) -> None:
    with pytest.raises(RequestError, match=r"vocab_size must lie in \[1, 4194304\]"):
        Sampler(SamplingParams(), vocab_size)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1), 300)
    for row in range(5):
        logits = make_logits(300, row)
        assert sampler.sample(logits.copy()) == int(logits.argmax())


def test_equal_logits_over_a_large_vocabulary() -> None:
    """All are in one histogram bin: the nucleus has the lowest ids, and every draw lies in it."""
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.25, seed=3), 4000)
    chosen = [sampler.sample(np.zeros(4000, dtype=np.float32)) for _ in range(300)]
    assert max(chosen) < 1000
    assert max(chosen) > 900


@pytest.mark.parametrize(
    ("narrow", "expected"),
    [
        ({"top_p": 0.5}, {0, 1, 2, 3}),
        ({"top_p": 0.5 + 1e-9}, {0, 1, 2, 3, 4}),
        ({"top_k": 4, "top_p": 0.5}, {0, 1}),
        ({"top_k": 4, "top_p": 0.5 + 1e-9}, {0, 1, 2}),
        ({"top_k": 3}, {0, 1, 2}),
        ({"min_p": 1.0}, set(range(8))),
        ({"top_k": 7, "min_p": 1.0}, set(range(7))),
    ],
)
def test_equal_logits_are_cut_exactly(narrow: dict[str, float], expected: set[int]) -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5, **narrow), 8)
    assert {sampler.sample(np.ones(8, dtype=np.float32)) for _ in range(200)} == expected


@pytest.mark.parametrize(("penalty", "history", "expected"), [(2.0, [0, 0, 0], 0), (2.0, [0, 1], 0), (4.0, [0], 1)])
def test_a_repeated_token_is_penalized_once(penalty: float, history: list[int], expected: int) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=penalty), 3)
    logits = np.array([3.0, 1.0, -1.0], dtype=np.float32)
    assert sampler.sample(logits, None, np.array(history, dtype=np.int32)) == expected


def test_a_penalty_below_one_makes_the_history_likelier() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=0.5), 3)
    assert sampler.sample(np.array([3.0, 2.0, 1.0], dtype=np.float32), None, np.array([1], dtype=np.int32)) == 1


def test_extreme_logits() -> None:
    logits = np.array([3.4e38, -3.4e38, -np.inf, 3.4e38], dtype=np.float32)
    for chain in CHAINS[:5]:
        sampler = Sampler(SamplingParams(seed=1, **chain), 4)
        assert sampler.sample(logits.copy()) in (0, 3)


def test_load_kernels_can_be_repeated() -> None:
    load_kernels()
    load_kernels()


def test_each_number_has_a_flag_and_each_logit_step_a_field_and_a_module() -> None:
    """A new sampling method is one module of `steps/` and one field of `SamplingParams`."""
    parser = argparse.ArgumentParser()
    add_sampling_flags(parser)
    assert set(RANGES) <= set(vars(parser.parse_args([])))
    assert set(LOGIT_STEPS) == {module.name for module in iter_modules(steps.__path__)}
    for name in LOGIT_STEPS:
        low, high = RANGES[name]
        params = SamplingParams().replace(**{name: (low + high) / 2})
        assert needs_kernels(params)
        assert 0 <= Sampler(params, 40).sample(make_logits(40, 1), None, np.array([3], dtype=np.int32)) < 40
