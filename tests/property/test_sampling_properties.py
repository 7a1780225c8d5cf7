"""Sampling equals its plain-loop twin for every size, parameter, mask, tie and -inf."""

from __future__ import annotations

import math

import naive_sampling
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgelm.errors import RequestError
from edgelm.sampling import Sampler, ranking, sampler_kernels
from edgelm.sampling.steps import repetition_penalty
from edgelm.types import SamplingParams

SEED = 5
FINITE = st.floats(-8, 8, width=32)
LEVELS = st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 2.0, 2.0, 7.0])  # many ties
LOGIT = st.one_of(FINITE, LEVELS, st.just(-math.inf))
LOGITS = st.one_of(st.lists(LOGIT, min_size=1, max_size=200), st.lists(LEVELS, min_size=1, max_size=200)).map(
    lambda values: np.array(values, dtype=np.float32)
)
HISTORY = st.one_of(st.lists(st.integers(0, 7), max_size=30), st.lists(st.integers(-3, 250), max_size=30))
TEMPERATURE = st.one_of(st.sampled_from([1e-3, 0.7, 1.0, 1.0]), st.floats(0.05, 20))


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(TEMPERATURE),
        top_k=draw(st.one_of(st.just(0), st.integers(1, 250))),
        top_p=draw(st.one_of(st.just(1.0), st.floats(0, 1))),
        min_p=draw(st.one_of(st.just(0.0), st.floats(0, 1))),
        repetition_penalty=draw(st.one_of(st.just(1.0), st.floats(0.5, 2))),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


@st.composite
def masked(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Logits and a mask that allows at least one token that the logits allow."""
    logits = draw(LOGITS)
    assume(np.isfinite(logits).any())
    words = -(-logits.size // 32)
    mask = np.array(draw(st.lists(st.integers(0, 2**32 - 1), min_size=words, max_size=words)), dtype=np.uint32)
    token = draw(st.sampled_from(np.flatnonzero(np.isfinite(logits)).tolist()))
    mask[token // 32] |= np.uint32(1 << (token % 32))
    return logits, mask


def uniform_of(seed: int) -> float:
    return (np.random.PCG64(seed).random_raw() >> 11) * 2.0**-53


@settings(max_examples=400)
@given(masked(), params(), HISTORY)
def test_sample_equals_the_naive_chain(
    row: tuple[np.ndarray, np.ndarray], params: SamplingParams, history: list[int]
) -> None:
    logits, mask = row
    expected = naive_sampling.penalize(naive_sampling.mask_logits(logits, mask), history, params.repetition_penalty)
    kept = naive_sampling.keep(expected, params)
    token = Sampler(params, logits.size).sample(logits, mask, np.array(history, dtype=np.int32))
    assert mask[token // 32] >> (token % 32) & 1
    assert expected[token] > -math.inf
    naive_token = kept.draw(uniform_of(params.seed))
    if kept.margin > 1e-6:
        assert token == naive_token


@given(masked(), params())
def test_limits_of_the_parameters_are_greedy(row: tuple[np.ndarray, np.ndarray], params: SamplingParams) -> None:
    logits, mask = row
    params = params.replace(repetition_penalty=1.0)
    allowed = naive_sampling.mask_logits(logits, mask)
    first_best = min(token for token, logit in enumerate(allowed) if logit == max(allowed))
    for narrow in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-12}):
        assert Sampler(params.replace(**narrow), logits.size).sample(logits.copy(), mask) == first_best


@given(masked(), params())
def test_same_seed_same_tokens(row: tuple[np.ndarray, np.ndarray], params: SamplingParams) -> None:
    logits, mask = row
    one, two = Sampler(params, logits.size), Sampler(params, logits.size)
    for _ in range(5):
        assert one.sample(logits.copy(), mask) == two.sample(logits.copy(), mask)


@given(LOGITS, st.sampled_from([math.nan, math.inf]), st.integers(0, 199), params())
def test_logits_that_are_not_finite_are_an_internal_error(
    logits: np.ndarray, bad: float, at: int, params: SamplingParams
) -> None:
    logits[at % logits.size] = bad
    for chosen in (params, params.replace(temperature=0.0, repetition_penalty=1.0)):
        with pytest.raises(RequestError, match=r"nan|inf") as caught:
            Sampler(chosen, logits.size).sample(logits.copy())
        assert caught.value.code == "internal"


@given(LOGITS, params())
def test_masking_everything_is_an_internal_error(logits: np.ndarray, params: SamplingParams) -> None:
    nothing = np.zeros(-(-logits.size // 32), dtype=np.uint32)
    for chosen in (params, params.replace(temperature=0.0, repetition_penalty=1.0)):
        with pytest.raises(RequestError) as caught:
            Sampler(chosen, logits.size).sample(logits.copy(), nothing)
        assert caught.value.code == "internal"


@given(LOGITS, st.integers(0, 20), st.integers(0, 199))
def test_logprobs_are_the_log_softmax(logits: np.ndarray, count: int, at: int) -> None:
    possible = np.flatnonzero(np.isfinite(logits))
    assume(possible.size)
    token = int(possible[at % possible.size])
    before = logits.copy()
    result = Sampler(SamplingParams(logprobs=count), logits.size).logprobs(logits, token)
    expected = naive_sampling.log_softmax(logits.astype(float).tolist())
    assert np.array_equal(logits, before)
    assert result.token == token
    assert result.logprob == pytest.approx(expected[token], abs=1e-5)
    ranked = sorted(possible.tolist(), key=lambda t: (-logits[t], t))[:count]
    assert [entry for entry, _ in result.top] == ranked
    assert [logprob for _, logprob in result.top] == pytest.approx([expected[t] for t in ranked], abs=1e-5)


@given(LOGITS, HISTORY, st.floats(0.01, 100))
def test_penalty_equals_its_twin_and_clears_its_scratch(logits: np.ndarray, history: list[int], penalty: float) -> None:
    seen = np.zeros(-(-logits.size // 32), dtype=np.uint32)
    expected = naive_sampling.penalize(logits, history, penalty)
    repetition_penalty.penalize(logits, np.array(history, dtype=np.int32), seen, np.float32(penalty))
    assert logits.tolist() == expected
    assert not seen.any()


@given(st.floats(-62, 0))
def test_weight_is_a_power_of_two(y: float) -> None:
    assert (
        abs(sampler_kernels.fixed_point_exp2(y) / sampler_kernels.FIXED_POINT_ONE - 2.0**y)
        <= 2.0 ** (y - 28) + 2.0**-40
    )
    assert sampler_kernels.fixed_point_exp2(0.0) == sampler_kernels.FIXED_POINT_ONE


@given(st.floats(width=32, allow_nan=False), st.floats(width=32, allow_nan=False))
def test_ranks_order_as_floats_do(a: float, b: float) -> None:
    left, right = (ranking.rank_of(np.array(x, dtype=np.float32).view(np.int32)[()]) for x in (a, b))
    assert (left < right) == (a < b)
    assert (left == right) == (a == b)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=300), st.integers(0, 300))
def test_sort_sorts_the_first_values_only(values: list[int], n: int) -> None:
    n = min(n, len(values))
    array = np.array(values, dtype=np.int64)
    ranking.sort(array, n)
    assert array.tolist() == sorted(values[:n]) + values[n:]


@given(st.lists(LOGIT, min_size=2, max_size=700), st.data())
def test_gather_top_k_is_the_head_of_the_sorted_order(values: list[float], data: st.DataObject) -> None:
    logits = np.array(values, dtype=np.float32)
    k = data.draw(st.integers(1, logits.size - 1))
    keys = np.empty(min(2 * k, logits.size), dtype=np.int64)
    n = ranking.gather_top_k(logits.view(np.int32), k, keys)
    finite = [token for token in range(logits.size) if logits[token] > -math.inf]
    expected = sorted(finite, key=lambda token: (-logits[token], token))[:k]
    assert sorted(ranking.token_of(key) for key in keys[:n].tolist()) == sorted(expected)
