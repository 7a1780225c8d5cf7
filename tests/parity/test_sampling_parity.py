"""The filters keep the same tokens as transformers' logits processors; the penalty equals theirs to the last bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgelm.sampling import Sampler, ranking, sampler_kernels
from edgelm.sampling.steps import repetition_penalty
from edgelm.types import SamplingParams

torch = pytest.importorskip("torch", reason="needs the extra: pip install 'edgelm[distill]'")
process = pytest.importorskip("transformers.generation.logits_process")

CASES = [
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.7, "top_p": 0.5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 100, "top_p": 0.95, "min_p": 0.03},
    {"temperature": 1.2, "top_p": 0.95, "min_p": 0.03, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.7, "top_k": 5},
]
VOCAB_SIZES = [1, 2, 63, 64, 65, 1000, 32_000]


def reference_scores(logits: np.ndarray, history: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Return the logits after transformers' logits processors, in the order of `generate`."""
    ids, scores = torch.from_numpy(history.astype(np.int64))[None], torch.from_numpy(logits.copy())[None]
    chain: list[Any] = []
    if params.repetition_penalty != 1.0:
        chain.append(process.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        chain.append(process.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(process.TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(process.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(process.MinPLogitsWarper(params.min_p))
    for step in chain:
        scores = step(ids, scores)
    return scores[0].numpy()


def draw(logits: np.ndarray, history: np.ndarray, params: SamplingParams, uniforms: np.ndarray) -> list[int]:
    """Return the token that the kernels draw for each uniform number."""
    logits = logits.copy()
    seen = np.zeros(-(-logits.size // 32), dtype=np.uint32)
    repetition_penalty.penalize(logits, history, seen, np.float32(params.repetition_penalty))
    arguments = (logits, logits.view(np.int32), float(logits.max()), 1.0 / params.temperature)
    keys = np.empty(logits.size, dtype=np.int64)
    scratch = np.empty(sampler_kernels.scratch_size(logits.size), dtype=np.int64)
    tokens = []
    for uniform in uniforms:
        filters = (params.top_p, params.min_p, uniform, keys)
        if 0 < params.top_k < logits.size:
            tokens.append(sampler_kernels.sample_top_k(*arguments, params.top_k, *filters))
        else:
            tokens.append(sampler_kernels.sample_all(*arguments, *filters, scratch))
    return tokens


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_token_is_drawn_at_the_middle_of_its_share(case: dict[str, Any], vocab_size: int) -> None:
    """A token too many or too few would shift the shares of all following tokens."""
    params = SamplingParams(**case)
    generator = np.random.default_rng(vocab_size)
    logits = (generator.standard_normal(vocab_size) * 3 + 1).astype(np.float32)
    logits[generator.integers(0, vocab_size, 3)] += 8
    history = generator.integers(0, vocab_size, 20).astype(np.int32)
    scores = reference_scores(logits, history, params).astype(np.float64)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    ends = np.cumsum(shares)
    clear = np.flatnonzero(shares > 1e-5)[:400]  # float32 scores: bounds exact to about 1e-6
    assert draw(logits, history, params, (ends - shares / 2)[clear]) == clear.tolist()
    kept = np.flatnonzero(scores > -math.inf)
    assert draw(logits, history, params, np.array([0.0])) == [kept[0]]


@pytest.mark.parametrize("penalty", [0.3, 1.1, 1.5, 7.0])
def test_the_penalty_is_bit_equal(penalty: float) -> None:
    generator = np.random.default_rng(1)
    logits = (generator.standard_normal(5000) * 4).astype(np.float32)
    history = generator.integers(0, 5000, 800).astype(np.int32)
    expected = reference_scores(logits, history, SamplingParams(temperature=1.0, repetition_penalty=penalty))
    repetition_penalty.penalize(logits, history, np.zeros(157, dtype=np.uint32), np.float32(penalty))
    assert np.array_equal(logits, expected)


@pytest.mark.parametrize("k", [1, 5, 64, 500])
def test_top_k_is_the_same_set(k: int) -> None:
    logits = np.random.default_rng(k).standard_normal(3000).astype(np.float32)
    keys = np.empty(2 * k, dtype=np.int64)
    n = ranking.gather_top_k(logits.view(np.int32), k, keys)
    scores = reference_scores(logits, np.zeros(0, np.int32), SamplingParams(temperature=1.0, top_k=k))
    assert {ranking.token_of(key) for key in keys[:n].tolist()} == set(np.flatnonzero(scores > -math.inf).tolist())


def test_log_probabilities_are_those_of_torch() -> None:
    logits = (np.random.default_rng(3).standard_normal(20_000) * 5).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    top = torch.topk(expected, 20)
    result = Sampler(SamplingParams(logprobs=20), logits.size).logprobs(logits, 77)
    assert result.logprob == pytest.approx(expected[77].item(), abs=1e-6)
    assert [token for token, _ in result.top] == top.indices.tolist()
    assert [value for _, value in result.top] == pytest.approx(top.values.tolist(), abs=1e-6)
