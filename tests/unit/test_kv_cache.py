"""Rows of the KV cache that are released: their memory is freed, and other rows do not change."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm.bundle.manifest import KVCacheShape
from edgelm.runtime.kv_cache import KVCache


def private_bytes():
    """Private memory of this process, without mapped files."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 600), st.sampled_from([8, 24, 64]), st.data())
def test_other_rows_do_not_change(rows, heads, capacity, size, data):
    buffers = KVCache(KVCacheShape("shared", layers=1, kv_heads=heads, head_size=size), rows, capacity)
    for array in buffers.arrays:
        array[:] = np.arange(array.size).reshape(array.shape)
    before = [array.copy() for array in buffers.arrays]
    released = data.draw(st.integers(0, rows - 1))
    buffers.release_row(released)
    for array, expected in zip(buffers.arrays, before, strict=True):
        for row in set(range(rows)) - {released}:
            np.testing.assert_array_equal(array[row], expected[row])
        array[released] = 5.0
        assert (array[released] == 5.0).all(), "it can be written again"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports private memory")
def test_a_released_row_takes_no_memory():
    buffers = KVCache(KVCacheShape("shared", layers=4, kv_heads=4, head_size=64), 3, 4096)
    held = sum(array[0].nbytes for array in buffers.arrays)
    empty = private_bytes()
    for array in buffers.arrays:
        array[:2] = 1.0
    assert private_bytes() - empty > 1.9 * held
    buffers.release_row(0)
    assert private_bytes() - empty < 1.2 * held
    assert all((array[1] == 1.0).all() for array in buffers.arrays)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux frees pages at once")
@pytest.mark.parametrize("together", [1, 4])
def test_rows_of_finished_requests_are_released(bundle, together):
    page = 4096 // 4  # the ends of a row may share a page with its neighbours
    with edgelm.load(str(bundle), threads=1, max_batch=4) as lm, ThreadPoolExecutor(together) as pool:
        prompts = [np.random.default_rng(i).integers(3, 60, lm.manifest.context - 8).tolist() for i in range(8)]
        list(pool.map(lambda prompt: lm.generate(tokens=prompt, max_tokens=4, ignore_eos=True), prompts))
        arrays = lm.worker.call(lambda engine: engine.runner._kv.arrays)
        assert arrays[0][0].size > 4 * page
        for array in arrays:
            assert not any(row.reshape(-1)[page:-page].any() for row in array[:4])  # the last one is for scores


LONG_PASS = """
import sys, edgelm
from edgelm.runtime import runner
runner.SHORT_PASS_TOKENS = int(sys.argv[2])
with edgelm.load(sys.argv[1], threads=1, max_batch=1, prefix_cache_mb=0, cache=False) as lm:
    lm.generate(tokens=[3] * 200, max_tokens=3, ignore_eos=True)
    text = open("/proc/self/smaps_rollup").read()
    print(text.split("Anonymous:")[1].split()[0])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux reports private memory")
def test_the_memory_of_a_long_pass_is_freed(tiny_checkpoint, export_to_cache):
    path = export_to_cache(tiny_checkpoint(hidden=512, mlp=8192, heads=8, kv_heads=4), quant="int4")

    def anonymous(short_pass_tokens):
        command = [sys.executable, "-c", LONG_PASS, str(path), str(short_pass_tokens)]
        return 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    widest = 200 * 2 * 8192 * 4
    assert anonymous(32) < anonymous(10**9) - widest
