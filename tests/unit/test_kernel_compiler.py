"""Kernels are compiled once for the board, and again if a cached file is damaged; no program fails because of it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgelm.system.board_cache import BoardCache

SAMPLE = """
import logging, numpy as np
logging.basicConfig(format="%(message)s")
from edgelm.sampling import ranking
print(ranking.rank_of(np.int32(5)), *ranking.rank_of.stats.cache_hits.values())
"""


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def sample(cache, **more):
    environment = {**os.environ, "EDGELM_CACHE_DIR": str(cache), **more}
    done = subprocess.run([sys.executable, "-c", SAMPLE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rank, *hits = map(int, done.stdout.split())
    assert rank == 5
    return sum(hits) > 0, done.stderr


def test_a_kernel_is_compiled_once(cache):
    assert sample(cache) == (False, "")
    assert list(BoardCache(cache).numba_folder.rglob("ranking.rank_of-*.nbi"))
    assert sample(cache) == (True, "")


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_file_is_compiled_again_with_one_warning(cache, ending, share):
    sample(cache)
    for file in BoardCache(cache).numba_folder.rglob(f"*.{ending}"):
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
    hit, said = sample(cache)
    assert not hit
    assert said.count("is damaged") == 1, said
    assert sample(cache) == (True, "")


def test_kernels_work_without_a_writable_folder(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    _, said = sample(tmp_path / "file")
    assert said == ""
    sample(tmp_path / "file")


def test_other_users_of_numba_keep_their_cache_folder():
    from numba import config

    from edgelm.sampling import ranking

    assert ranking is not None
    assert str(BoardCache.default().numba_folder) != config.CACHE_DIR


def test_nothing_is_compiled_without_numba(monkeypatch):
    """A board that never samples does not need Numba."""
    from edgelm.sampling import precompilation

    monkeypatch.setattr(precompilation, "find_spec", lambda name: None)
    monkeypatch.setattr(precompilation, "load_kernels", lambda: pytest.fail("nothing can be loaded"))
    precompilation.ensure_compiled()
