"""Rounding to nearest: the grid covers each block, and the kernel equals its plain-loop twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import naive_quantize
from edgelm_export.quantize.methods import rtn
from edgelm_export.quantize.pack import dequantize
from edgelm_export.quantize.quantizer import Quantizer
from quantize_cases import blocks_of, check_kernel, importances, matrices, specs


@given(weight=matrices(), spec=specs(["rtn"]))
def test_no_weight_is_further_than_one_step_from_the_grid(weight, spec):
    packed = Quantizer(spec, scale_dtype=np.float32).quantize(weight)
    error = np.abs(blocks_of(weight, spec.block_size) - blocks_of(dequantize(packed), spec.block_size))
    steps = error / np.abs(packed.scales.astype(np.float64))[:, :, None]
    assert (steps <= 1 + 1e-3).all()  # one step: symmetric grids end a step short on one side, zero points are rounded


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=40)
@given(weight=matrices(), importance=importances(70), spec=specs(["rtn"]), half=st.booleans())
def test_the_kernel_equals_its_plain_twin(compiled, weight, importance, spec, half):
    check_kernel(
        rtn.choose_grids,
        lambda block, importance, *options: naive_quantize.plain_grid(block, *options),
        compiled=compiled,
        weight=weight,
        importance=importance,
        spec=spec,
        half=half,
    )
