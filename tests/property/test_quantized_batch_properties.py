"""Quantized models compute nearly the same logits of a row in a batch and alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.runtime.runner import open_runner

ROWS = 4
MAX_DIFFERENCE = 0.03
"""Maximum difference of a row's logits in a batch and alone, in standard deviations of the logits.

onnxruntime's kernels may round an activation between two codes either way: 0.015 in about one of a thousand batches."""


@pytest.fixture(scope="module", params=["int8", "int4"])
def runner(request, tiny_checkpoint, export_to_cache):
    bundle = export_to_cache(tiny_checkpoint(tied=False), quant=request.param)
    return open_runner(open_bundle(bundle), rows=ROWS, threads=1)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=ROWS), seed=st.integers(0, 2**32))
def test_a_row_has_the_same_logits_in_a_batch_and_alone(runner, lengths, seed):
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(2, 300, length) for length in lengths]
    following, filled = generator.integers(2, 300, len(lengths)), np.array(lengths, np.int32)
    for row, prompt in enumerate(prompts):
        runner.prefill(row, prompt, 0)
    together = runner.decode(following, filled).copy()
    for row, prompt in enumerate(prompts):
        runner.prefill(0, prompt, 0)
        alone = runner.decode(following[row : row + 1], filled[row : row + 1])[0]
        assert np.abs(together[row] - alone).max() <= MAX_DIFFERENCE * alone.std()
