"""Absmax: the range is the same on both sides of zero, and the kernel equals its plain-loop twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.quantize.methods import absmax
from edgelm_export.quantize.pack import dequantize, unpack_codes
from edgelm_export.quantize.quantizer import Quantizer
from naive_quantize import to_stored
from quantize_cases import blocks_of, check_kernel, importances, matrices, specs


def naive_grid(block, _importance, bits, _symmetric, half):
    zero = 2 ** (bits - 1)
    return to_stored(max(map(abs, block)) / (zero - 1), half), zero


@given(weight=matrices(), spec=specs(["absmax"]))
def test_every_weight_moves_at_most_half_a_step_and_the_lowest_code_is_unused(weight, spec):
    packed = Quantizer(spec, scale_dtype=np.float32).quantize(weight)
    error = np.abs(blocks_of(weight, spec.block_size) - blocks_of(dequantize(packed), spec.block_size))
    steps = error / np.abs(packed.scales.astype(np.float64))[:, :, None]
    assert (steps <= 0.5 + 1e-3).all()
    assert (unpack_codes(packed) > 0).all()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@settings(max_examples=40)
@given(weight=matrices(), importance=importances(70), spec=specs(["absmax"]), half=st.booleans())
def test_the_kernel_equals_its_plain_twin(compiled, weight, importance, spec, half):
    check_kernel(
        absmax.choose_grids,
        naive_grid,
        compiled=compiled,
        weight=weight,
        importance=importance,
        spec=spec,
        half=half,
    )
