"""Rotary tables against a plain-loop twin in float64, and properties of all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.architectures.rope import ROPE_KINDS, RopeConfig, longrope_attention_factor, yarn_attention_factor


def naive_frequency(rope, i, size, long=False):
    """Radians per position of pair `i`, by the papers' formulas, in Python numbers."""
    frequency = rope.theta ** (-2 * i / size)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "longrope":
        return frequency / (rope.long_factors if long else rope.short_factors)[i]
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequency
        if wavelength > rope.original_context / rope.low_freq_factor:
            return frequency / rope.factor
        if wavelength < rope.original_context / rope.high_freq_factor:
            return frequency
        share = rope.original_context / wavelength - rope.low_freq_factor
        share /= rope.high_freq_factor - rope.low_freq_factor
        return (1 - share) * frequency / rope.factor + share * frequency
    if rope.kind == "yarn":
        share = naive_yarn_share(rope, i, size)
        return share * frequency / rope.factor + (1 - share) * frequency
    return frequency


def naive_yarn_share(rope, i, size):
    """The interpolated share of pair `i`: 0 with many turns in the original context, 1 with few."""

    def pair_that_turns(times):
        return size * math.log(rope.original_context / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        return float(i > first)
    return min(max((i - first) / (last - first), 0.0), 1.0)


@st.composite
def ropes(draw, kinds=ROPE_KINDS):
    """A rope and its rotary size."""
    size = 2 * draw(st.integers(1, 40))
    kind = draw(st.sampled_from(kinds))
    numbers = st.floats(1.0, 60.0)
    factors = st.tuples(*[numbers] * (size // 2))
    low = draw(st.floats(0.5, 3.0))
    return size, RopeConfig(
        theta=draw(st.sampled_from([50.0, 1e4, 5e5, 1e8]) | st.floats(20.0, 1e7)),
        kind=kind,
        factor=draw(st.floats(1.0, 40.0)),
        original_context=draw(st.integers(8, 9000)),
        low_freq_factor=low,
        high_freq_factor=low + draw(st.floats(0.5, 5.0)),
        beta_fast=draw(st.floats(8.0, 64.0)),
        beta_slow=draw(st.floats(0.5, 4.0)),
        truncate=draw(st.booleans()),
        attention_factor=draw(st.floats(0.5, 2.0)) if kind in ("yarn", "longrope") else 1.0,
        short_factors=draw(factors) if kind == "longrope" else (),
        long_factors=draw(factors) if kind == "longrope" else (),
    )


@given(ropes(), st.integers(1, 400))
def test_cosine_and_sine_lie_on_a_circle_of_radius_attention_factor(drawn, context):
    size, rope = drawn
    cosines, sines = rope.tables(context, size)
    rows = context * (1 if rope.long_from(context) is None else 2)
    assert cosines.shape == sines.shape == (rows, size // 2)
    assert cosines.dtype == sines.dtype == np.float32
    np.testing.assert_allclose(np.hypot(cosines, sines), rope.attention_factor, rtol=1e-6)
    np.testing.assert_allclose(cosines[0], rope.attention_factor, rtol=1e-6)  # position 0 does not rotate
    assert not sines[0].any()


@given(ropes(), st.integers(2, 400))
def test_the_tables_equal_the_plain_formulas(drawn, context):
    size, rope = drawn
    parts = [False] if rope.long_from(context) is None else [False, True]
    angles = [
        p * naive_frequency(rope, i, size, long) for long in parts for p in range(context) for i in range(size // 2)
    ]
    expected = np.array(angles).reshape(-1, size // 2)
    cosines, sines = rope.tables(context, size)
    tolerance = 2e-6 * (1 + np.abs(expected))  # an angle in float32 is as exact as its size allows
    for found, exact in ((cosines, np.cos(expected)), (sines, np.sin(expected))):
        assert (np.abs(found - rope.attention_factor * exact) < tolerance * rope.attention_factor).all()


@given(ropes(kinds=("longrope",)), st.integers(1, 300))
def test_longrope_has_both_tables_if_the_context_exceeds_the_original(drawn, context):
    size, rope = drawn
    cosines, sines = rope.tables(context, size)
    short = RopeConfig(rope.theta, "longrope", original_context=context, short_factors=rope.short_factors)
    long = RopeConfig(rope.theta, "longrope", original_context=context, short_factors=rope.long_factors)
    scale = np.float32(rope.attention_factor)
    for which, table in enumerate((cosines, sines)):
        np.testing.assert_array_equal(table[:context], short.tables(context, size)[which] * scale)
        if context > rope.original_context:
            assert rope.long_from(context) == rope.original_context
            np.testing.assert_array_equal(table[context:], long.tables(context, size)[which] * scale)
        else:
            assert rope.long_from(context) is None
            assert len(table) == context


@given(ropes(kinds=[kind for kind in ROPE_KINDS if kind != "longrope"]), st.integers(1, 100_000))
def test_other_kinds_have_one_table(drawn, context):
    assert drawn[1].long_from(context) is None


@given(ropes(kinds=("linear", "llama3", "yarn")))
def test_scaling_divides_frequencies_by_one_to_factor(drawn):
    size, rope = drawn
    found = rope._frequencies(size, ())
    plain = RopeConfig(rope.theta)._frequencies(size, ())
    assert (found <= plain * np.float32(1 + 1e-6)).all()
    assert (found * np.float32(rope.factor) >= plain * np.float32(1 - 1e-5)).all()


@given(st.floats(0.1, 1.0), st.floats(0.1, 3.0), st.floats(0.1, 3.0), st.integers(2, 9000))
def test_a_factor_of_one_scales_nothing(factor, mscale, mscale_all, original):
    assert yarn_attention_factor(factor, mscale, mscale_all) == 1.0
    assert yarn_attention_factor(factor, None, None) == 1.0
    assert longrope_attention_factor(factor, original) == 1.0


@given(st.floats(1.001, 100.0), st.floats(0.1, 3.0), st.floats(0.1, 3.0))
def test_the_attention_factor_of_yarn(factor, mscale, mscale_all):
    recommended = 0.1 * math.log(factor) + 1
    assert yarn_attention_factor(factor, None, None) == pytest.approx(recommended)
    assert yarn_attention_factor(factor, mscale, None) == pytest.approx(recommended)
    assert yarn_attention_factor(factor, None, mscale_all) == pytest.approx(recommended)
    share = (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all * math.log(factor) + 1)
    assert yarn_attention_factor(factor, mscale, mscale_all) == pytest.approx(share)


def test_the_attention_factor_of_longrope():
    """Phi-3-mini-128k: 4,096 positions stretched to 131,072."""
    assert longrope_attention_factor(32, 4096) == pytest.approx(1.1902380714238083)
