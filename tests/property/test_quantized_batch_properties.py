"""Quantized models compute a row of a batch as they compute it alone, within a stated difference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle.bundle_folder import open_bundle
from edgelm.runtime.runner import open_runner

ROWS = 4
MOST = 0.03
"""Of the logits' standard deviation: how far a row's logits in a batch may lie from those alone.

On onnxruntime's kernels an activation between two codes may go either way: 0.015 in one of some thousand batches."""


@pytest.fixture(scope="module", params=["int8", "int4"])
def session(request, tiny_checkpoint, export_to_cache):
    bundle = export_to_cache(tiny_checkpoint(tied=False), quant=request.param)
    return open_runner(open_bundle(bundle), rows=ROWS, threads=1)


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 60), min_size=2, max_size=ROWS), seed=st.integers(0, 2**32))
def test_a_row_of_a_batch_has_the_logits_that_it_has_alone(session, lengths, seed):
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(2, 300, length) for length in lengths]
    following, filled = generator.integers(2, 300, len(lengths)), np.array(lengths, np.int32)
    for row, prompt in enumerate(prompts):
        session.prefill(row, prompt, 0)
    together = session.decode(following, filled).copy()
    for row, prompt in enumerate(prompts):
        session.prefill(0, prompt, 0)
        alone = session.decode(following[row : row + 1], filled[row : row + 1])[0]
        assert np.abs(together[row] - alone).max() <= MOST * alone.std()
