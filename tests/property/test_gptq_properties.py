"""GPTQ, its coordinate descent, and drift compensation: each lowers its cost; kernels equal their plain-loop twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import itertools

import naive_quantize
from edgelm_export.quantize import quantizer
from edgelm_export.quantize.methods import gptq
from edgelm_export.quantize.methods.gptq import gptq_factors, order_and_factor
from edgelm_export.quantize.moments import (
    DAMPING,
    HeldOut,
    Moments,
    add_lookup_weight,
    compensate_drift,
    output_error,
)
from edgelm_export.quantize.pack import PackedMatrix, dequantize
from edgelm_export.quantize.quantizer import Quantizer
from edgelm_export.quantize.spec import QuantSpec

from edgelm.errors import EdgelmError

specs = st.builds(
    QuantSpec, st.sampled_from([4, 5, 6, 8]), st.sampled_from([32, 64]), st.just(True), st.just("gptq")
) | st.builds(QuantSpec, st.sampled_from([4, 8]), st.sampled_from([16, 32, 64]), st.booleans(), st.just("gptq"))


@st.composite
def layers(draw, most_columns=80):
    """A matrix [N, K], correlated inputs [T, K], and the same with drift; some channels may be zero."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, columns, count = draw(st.integers(1, 12)), draw(st.integers(1, most_columns)), draw(st.integers(1, 200))
    mixed = generator.normal(size=(columns, columns)) * 10.0 ** generator.uniform(-2, 1, columns)
    x = generator.normal(size=(count, columns)) @ mixed
    if draw(st.booleans()):
        x[:, generator.random(columns) < 0.3] = 0
    weight = generator.normal(size=(rows, columns)).astype(np.float32) * np.float32(10.0 ** generator.uniform(-2, 2))
    return weight, x, x + 0.1 * generator.normal(size=x.shape) @ mixed


def moments_of(x):
    return Moments(x.T @ x, count=len(x))


def cost(weight, read, hessian):
    """The quadratic form of each row's error."""
    error = read.astype(np.float64) - weight
    return np.einsum("nk,kl,nl->n", error, hessian.astype(np.float64), error)


@given(layer=layers())
def test_the_factors_are_those_of_the_second_moments_and_their_inverse(layer):
    _, x, _ = layer
    hessian = moments_of(x).damped_hessian()
    both = gptq_factors(hessian).astype(np.float64)
    lower = np.tril(both)
    upper = np.diag(1 / np.diag(both)) - np.triu(both, 1)
    size = np.abs(hessian).max()
    assert np.allclose(lower.T @ lower, hessian, rtol=0, atol=1e-4 * size)
    assert np.allclose(upper @ lower.T, np.eye(len(hessian)), rtol=0, atol=1e-2)


@given(layer=layers(), spec=specs)
def test_the_descent_never_raises_the_cost_that_gptq_left(layer, spec):
    weight, x, _ = layer
    hessian = moments_of(x).damped_hessian()
    costs = []
    for rounds in (0, 1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gptq, "DESCENT_ROUNDS", rounds)
            read = dequantize(Quantizer(spec, moments=moments_of(x), scale_dtype=np.float32).quantize(weight))
        costs.append(cost(weight, read, hessian))
    slack = 1e-4 * costs[0] + 1e-7 * cost(weight, 0 * weight, hessian)
    for before, after in itertools.pairwise(costs):
        assert (after <= before + slack).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_costs_much_less_than_rounding_for_correlated_inputs(symmetric):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(2000, 16)) @ generator.normal(size=(16, 128)) + 0.3 * generator.normal(size=(2000, 128))
    weight = generator.normal(size=(64, 128)).astype(np.float32)
    moments = moments_of(x)
    costs = []
    for method, rounds in (("clip", 0), ("gptq", 0), ("gptq", gptq.DESCENT_ROUNDS)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gptq, "DESCENT_ROUNDS", rounds)
            read = dequantize(Quantizer(QuantSpec(4, 32, symmetric, method), moments=moments).quantize(weight))
        costs.append(cost(weight, read, moments.hessian).sum())
    assert costs[1] < 0.5 * costs[0]
    assert costs[2] < 0.9 * costs[1]


@given(layer=layers(), spec=specs)
def test_gptq_rounds_to_nearest_for_uncorrelated_inputs(layer, spec):
    weight, _, _ = layer
    moments = Moments(np.eye(weight.shape[1]))
    by_gptq = Quantizer(spec, moments=moments).quantize(weight)
    clip = QuantSpec(spec.bits, spec.block_size, spec.symmetric, "clip")
    by_clip = Quantizer(clip, moments=moments).quantize(weight)
    squares = [((dequantize(packed) - weight.astype(np.float64)) ** 2).sum(axis=1) for packed in (by_gptq, by_clip)]
    assert (squares[0] <= squares[1] * (1 + 1e-3) + 1e-12).all()  # the same, or a scale fitted further


@given(layer=layers(), spec=specs, cut=st.integers(1, 20), cpus=st.integers(1, 9))
def test_the_codes_of_a_row_do_not_depend_on_the_other_rows(layer, spec, cut, cpus):
    weight, x, _ = layer
    one = Quantizer(spec, moments=moments_of(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer.os, "cpu_count", lambda: cpus)
        whole = one.quantize(weight)
    joined = PackedMatrix.join_rows([one.quantize(weight[i : i + cut]) for i in range(0, len(weight), cut)])
    for name in ("data", "scales", "zero_points"):
        assert np.array_equal(getattr(joined, name), getattr(whole, name)), name


def test_channels_without_input_are_rounded_to_nearest():
    generator = np.random.default_rng(0)
    x, weight = generator.normal(size=(100, 64)), generator.normal(size=(8, 64)).astype(np.float32)
    x[:, ::2] = 0
    read = dequantize(Quantizer(QuantSpec(8, 32, method="gptq"), moments=moments_of(x)).quantize(weight))
    assert np.abs(read - weight).max() < 0.1
    nothing = dequantize(Quantizer(QuantSpec(8, 32, method="gptq"), moments=moments_of(0 * x)).quantize(weight))
    assert np.abs(nothing - weight).max() < 0.1


def test_gptq_without_calibration_text_is_refused():
    with pytest.raises(EdgelmError, match="calibration text"):
        Quantizer(QuantSpec(4, 32, method="gptq"))


def test_columns_are_ordered_by_their_moments():
    x = np.random.default_rng(0).normal(size=(100, 3)) * [1, 100, 10]
    order, hessian, _ = order_and_factor(moments_of(x))
    assert order.tolist() == [1, 2, 0]
    assert np.array_equal(hessian, moments_of(x).damped_hessian()[np.ix_(order, order)])


def test_equal_channels_of_very_different_scales_can_be_factored():
    generator = np.random.default_rng(0)
    x = np.repeat(generator.normal(size=(50, 1)), 400, axis=1) * 10.0 ** generator.uniform(-4, 4, 400)
    weight = generator.normal(size=(2, 400)).astype(np.float32)
    read = dequantize(Quantizer(QuantSpec(8, 32, method="gptq"), moments=moments_of(x)).quantize(weight))
    assert np.square(x @ (read - weight).T).sum() < 1e-2 * np.square(x @ weight.T).sum()


def test_moments_that_are_not_positive_definite_are_refused():
    with pytest.raises(EdgelmError, match="positive definite"):
        Quantizer(QuantSpec(4, 32, method="gptq"), moments=Moments(np.full((8, 8), 9.0) - 8 * np.eye(8)))


# --- making up for the drift of the matrices before ---


@given(layer=layers(most_columns=40), seed=st.integers(0, 99), parts=st.sampled_from(["cross", "residual", "both"]))
def test_compensation_brings_outputs_closer_to_the_unquantized_model(layer, seed, parts):
    weight, full, own = layer
    drift = full - own if parts != "residual" else 0 * own
    stream = np.random.default_rng(seed).normal(size=(len(own), len(weight))) if parts != "cross" else None
    moments = Moments(
        own.T @ own, drift.T @ own if parts != "residual" else None, None if stream is None else stream.T @ own
    )
    target = (own + drift) @ weight.T.astype(np.float64) + (0 if stream is None else stream)
    missed = [((own @ w.T.astype(np.float64) - target) ** 2).sum() for w in (weight, compensate_drift(weight, moments))]
    assert missed[1] <= missed[0] * (1 + 1e-4) + 1e-6 * (target**2).sum()


def test_a_linear_drift_is_compensated():
    generator = np.random.default_rng(0)
    full, weight = generator.normal(size=(500, 32)), generator.normal(size=(16, 32)).astype(np.float32)
    own = full @ (np.eye(32) + 0.1 * generator.normal(size=(32, 32)))
    moved = compensate_drift(weight, Moments(own.T @ own, (full - own).T @ own))
    missed = [np.square(own @ w.T - full @ weight.T).sum() for w in (weight, moved)]
    assert missed[1] < 0.05 * missed[0]


def test_without_drift_weights_are_unchanged():
    weight = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    assert np.array_equal(compensate_drift(weight, Moments(np.eye(8))), weight)
    assert np.array_equal(compensate_drift(weight, Moments(np.eye(8), np.zeros((8, 8)), np.zeros((4, 8)))), weight)


@given(layer=layers(most_columns=40), seed=st.integers(0, 99), outlier=st.sampled_from([1.0, 1e2, 1e3, 1e4]))
def test_compensation_never_raises_the_error_on_held_out_positions(layer, seed, outlier):
    """Unrepresentative positions in the sums, such as one with huge values, cannot spoil the weights."""
    weight, full, own = layer
    generator = np.random.default_rng(seed)
    drift = full - own
    own, drift = own.copy(), drift.copy()
    own[0] *= outlier
    drift[0] = outlier * generator.normal(size=drift[0].shape)
    held_x = generator.normal(size=(30, own.shape[1])).astype(np.float32)
    held_target = held_x @ weight.T + 0.01 * generator.normal(size=(30, len(weight))).astype(np.float32)
    held = HeldOut(held_x, held_target)
    moved = compensate_drift(weight, Moments(own.T @ own, drift.T @ own, held_out=held))
    assert np.isfinite(moved).all()
    assert output_error(weight, held, moved) <= output_error(weight, held, weight) * (1 + 1e-3) + 1e-9


def test_compensation_is_complete_if_held_out_positions_agree():
    generator = np.random.default_rng(0)
    full, weight = generator.normal(size=(600, 32)), generator.normal(size=(16, 32)).astype(np.float32)
    own = full @ (np.eye(32) + 0.1 * generator.normal(size=(32, 32)))
    held = HeldOut(own[500:].astype(np.float32), (full[500:] @ weight.T).astype(np.float32))
    moments = Moments(own[:500].T @ own[:500], (full[:500] - own[:500]).T @ own[:500], held_out=held)
    assert output_error(weight, held, compensate_drift(weight, moments)) < 0.05 * output_error(weight, held, weight)


@given(layer=layers(), outlier=st.sampled_from([1.0, 1e2, 1e4]))
def test_a_channel_of_outliers_does_not_damp_the_others(layer, outlier):
    _, x, _ = layer
    x = x.copy()
    x[:, 0] *= outlier
    moments = moments_of(x)
    diagonal = np.diag(moments.hessian)
    typical = np.median(diagonal[diagonal > 0]) if diagonal.any() else 1.0
    added = moments.damped_diagonal() - diagonal
    assert (added <= 1.01 * DAMPING * np.maximum(diagonal, typical) + 1e-6 * diagonal).all()
    assert (moments.damped_diagonal() > 0).all()


def test_a_lookup_adds_to_the_head_s_moments_in_every_direction():
    head = Moments(np.diag([1.0, 3.0]), count=7)
    assert np.allclose(add_lookup_weight(head, 0.5).hessian, np.diag([2.0, 4.0]))
    assert np.array_equal(head.hessian, np.diag([1.0, 3.0]))


# --- the kernels and their twins ---


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=20)
@given(layer=layers(most_columns=24), spec=specs, half=st.booleans(), seed=st.integers(0, 99))
def test_the_kernels_equal_their_plain_twins(compiled, layer, spec, half, seed):
    weight, x, _ = layer
    weight = weight[:3]
    columns, top = weight.shape[1], 2.0**spec.bits - 1
    generator = np.random.default_rng(seed)
    hessian = moments_of(x).damped_hessian()
    order = generator.permutation(columns)
    groups = order // spec.block_size
    blocks = -(-columns // spec.block_size)
    members = np.full((blocks, spec.block_size), -1, np.int64)
    members.reshape(-1)[order] = np.arange(columns)
    largest = np.abs(weight).max() + np.float32(1e-3)
    scales = (largest * generator.uniform(0.05, 0.2, (len(weight), blocks))).astype(np.float32)
    zeros = generator.integers(0, top + 1, scales.shape).astype(np.float32)
    kernels = [gptq.round_and_spread_error, gptq.improve_codes, gptq.improve_scales]
    rounded, codes_better, scales_better = kernels if compiled else map(naive_quantize.as_python, kernels)

    residual, codes = weight.copy(), np.full(weight.shape, 255, np.uint8)
    table = gptq_factors(hessian)
    rounded(residual, table, scales, zeros, groups, top, codes)
    expected_codes, expected_residual = naive_quantize.round_and_spread_error(weight, table, scales, zeros, groups, top)
    assert np.array_equal(codes, expected_codes)
    assert np.array_equal(residual, expected_residual)
    for _ in range(2):
        expected = naive_quantize.improve_codes(residual, hessian, scales, zeros, groups, top, codes)
        changed = codes_better(residual, hessian, scales, zeros, groups, top, codes)
        assert np.array_equal(codes, expected[0])
        assert np.array_equal(residual, expected[1])
        assert changed == expected[2]
        expected = naive_quantize.improve_scales(residual, hessian, scales, zeros, members, half, codes)
        changed = scales_better(residual, hessian, scales, zeros, members, half, codes)
        assert np.array_equal(scales, expected[0])
        assert np.array_equal(residual, expected[1])
        assert changed == expected[2]


@given(layer=layers(most_columns=40), spec=specs)
def test_the_kernels_residual_equals_that_of_the_codes(layer, spec):
    weight, x, _ = layer
    hessian = moments_of(x).damped_hessian()
    groups = np.arange(weight.shape[1]) // spec.block_size
    top = 2.0**spec.bits - 1
    scales = np.full((len(weight), groups[-1] + 1), np.abs(weight).max() / 8 + 1e-3, np.float32)
    zeros = np.full_like(scales, 2 ** (spec.bits - 1))
    residual, codes = weight.copy(), np.zeros(weight.shape, np.uint8)
    gptq.round_and_spread_error(residual, gptq_factors(hessian), scales, zeros, groups, top, codes)
    gptq.improve_codes(residual, hessian, scales, zeros, groups, top, codes)
    read = (codes.astype(np.float64) - zeros[:, groups]) * scales[:, groups]
    expected = (weight - read) @ hessian.astype(np.float64)
    assert np.allclose(residual, expected, rtol=0, atol=1e-3 * np.abs(weight).max() * np.abs(hessian).max())
