"""Half-quadratic quantization: the lp error never grows, and the kernel equals its plain-loop twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import naive_quantize
from edgelm_export.quantize import quantizer
from edgelm_export.quantize.methods import hqq
from edgelm_export.quantize.pack import dequantize
from edgelm_export.quantize.spec import QuantSpec
from quantize_cases import block_errors, check_kernel, importances, matrices, quantize, specs


@given(data=st.data(), weight=matrices(), spec=specs(["hqq"]))
def test_the_lp_error_of_a_block_is_never_larger_than_with_rtn(data, weight, spec):
    importance = data.draw(importances(weight.shape[1]))
    rtn = QuantSpec(spec.bits, spec.block_size, spec.symmetric, "rtn")
    weights = quantizer._normalized(importance).astype(np.float64)
    before, after = (
        block_errors(weight, dequantize(quantize(weight, each, importance=importance)), weights, spec.block_size, 0.7)
        for each in (rtn, spec)
    )
    largest = block_errors(weight, 0, weights, spec.block_size, 0.7)
    assert (after <= before * (1 + 1e-5) + 1e-6 * largest).all()  # values are read back in float32


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=40)
@given(weight=matrices(), importance=importances(70), spec=specs(["hqq"]), half=st.booleans())
def test_the_kernel_equals_its_plain_twin(compiled, weight, importance, spec, half):
    check_kernel(
        hqq.choose_grids,
        naive_quantize.hqq_grid,
        compiled=compiled,
        weight=weight,
        importance=importance,
        spec=spec,
        half=half,
    )
