"""The scale search: no block gets worse than with rounding to nearest, and the kernel equals its plain-loop twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import naive_quantize
from edgelm_export.quantize import quantizer
from edgelm_export.quantize.methods import clip
from edgelm_export.quantize.moments import Moments
from edgelm_export.quantize.pack import dequantize
from edgelm_export.quantize.quantizer import Quantizer
from edgelm_export.quantize.spec import QuantSpec
from quantize_cases import block_errors, check_kernel, importances, matrices, quantize, specs


@given(data=st.data(), weight=matrices(), spec=specs(["clip"]))
def test_the_squared_error_of_a_block_is_never_larger_than_with_rtn(data, weight, spec):
    importance = data.draw(importances(weight.shape[1]))
    rtn = QuantSpec(spec.bits, spec.block_size, spec.symmetric, "rtn")
    weights = quantizer._normalized(importance).astype(np.float64)
    before, after = (
        block_errors(weight, dequantize(quantize(weight, each, importance=importance)), weights, spec.block_size, 2)
        for each in (rtn, spec)
    )
    largest = block_errors(weight, 0, weights, spec.block_size, 2)
    assert (after <= before * (1 + 1e-5) + 1e-6 * largest).all()  # values are read back in float32


@pytest.mark.parametrize("symmetric", [True, False])
def test_normal_weights_lose_less_than_with_rtn(symmetric):
    weight = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    errors = [
        ((dequantize(quantize(weight, QuantSpec(4, 32, symmetric, method))) - weight) ** 2).sum()
        for method in ("rtn", "clip")
    ]
    assert errors[1] < 0.93 * errors[0]


def test_importance_moves_the_error_to_less_important_columns():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(64, 256)).astype(np.float32)
    importance = np.where(np.arange(256) % 4 == 0, 50, 1).astype(np.float32)

    def cost(**known):
        read = dequantize(Quantizer(QuantSpec(4, 32), **known).quantize(weight))
        return (importance * (read - weight) ** 2).sum()

    assert cost(importance=importance) < 0.8 * cost()
    assert cost(moments=Moments(np.diag(importance), count=1)) < 0.8 * cost()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=40)
@given(weight=matrices(), importance=importances(70), spec=specs(["clip"]), half=st.booleans())
def test_the_kernel_equals_its_plain_twin(compiled, weight, importance, spec, half):
    check_kernel(
        clip.choose_grids,
        lambda *block_and_options: naive_quantize.searched_grid(*block_and_options, clip.SCALE_CANDIDATES),
        compiled=compiled,
        weight=weight,
        importance=importance,
        spec=spec,
        half=half,
    )


@pytest.mark.parametrize("candidates", [0, 1, 2, 7])
@settings(max_examples=20)
@given(weight=matrices(), importance=importances(70), spec=specs(["clip"]), half=st.booleans())
def test_any_number_of_candidates_equals_the_plain_twin(candidates, weight, importance, spec, half):
    block = weight[0, :70]
    importance = importance[: len(block)] + np.float32(1e-6)
    options = (spec.bits, spec.symmetric, half, candidates)
    expected = naive_quantize.searched_grid(block.tolist(), importance.tolist(), *options)
    assert clip.search_grid(block, importance, *options) == expected
