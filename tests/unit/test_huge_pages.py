"""Files that are written in huge pages and mapped."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.kernels import huge_pages
from edgelm.kernels.huge_pages import HugePageFile, map_file


@pytest.fixture(scope="module", autouse=True)
def small_pages():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huge_pages, "HUGE_PAGE_BYTES", 16)
        yield


@given(st.lists(st.one_of(st.binary(max_size=50), st.binary(min_size=16, max_size=16))))
def test_bytes_are_written_in_whole_pages(parts):
    whole = b"".join(parts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data"
        with HugePageFile(path) as file:
            place = 0
            for part in parts:
                file.write(part)
                place += len(part)
                assert file.offset == place
                assert path.read_bytes() == whole[: place // 16 * 16], "only whole pages before the end"
        assert path.read_bytes() == whole
        assert file.offset == len(whole)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
def test_arrays_are_written_as_bytes(tmp_path, dtype):
    values = np.arange(5 * 7 * 2).reshape(5, 7, 2).astype(dtype)
    with HugePageFile(tmp_path / "data") as file:
        file.write(values.data)
        assert file.offset == values.nbytes
    assert (tmp_path / "data").read_bytes() == values.tobytes()


def test_short_writes_are_continued(tmp_path):
    with HugePageFile(tmp_path / "data") as file:
        taken, whole = [], file._file

        class Slow:
            def write(self, content):
                taken.append(len(content))
                return whole.write(content[:5])

            def __enter__(self):
                return whole.__enter__()

            def __exit__(self, *rest):
                return whole.__exit__(*rest)

        file._file = Slow()
        file.write(bytes(range(18)))
    assert (tmp_path / "data").read_bytes() == bytes(range(18))
    assert taken == [16, 11, 6, 1, 2]


def test_after_an_error_the_rest_is_not_written_and_the_file_is_closed(tmp_path):
    with pytest.raises(TypeError), HugePageFile(tmp_path / "data") as file:
        _ = [file.write(part) for part in (bytes(20), "no bytes")]
    assert (tmp_path / "data").stat().st_size == 16
    with pytest.raises(ValueError, match="closed"):
        file.write(bytes(16))


def test_a_file_is_closed_at_the_end(tmp_path):
    with HugePageFile(tmp_path / "data") as file:
        pass
    assert (tmp_path / "data").read_bytes() == b""
    with pytest.raises(ValueError, match="closed"):
        file.write(bytes(16))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 100_000])
def test_mapped_bytes_are_read_only_and_stay_after_the_file_is_removed(tmp_path, size):
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "data").write_bytes(content)
    found = map_file(tmp_path / "data")
    (tmp_path / "data").unlink()
    assert (found.dtype, found.tobytes()) == (np.uint8, content)
    with pytest.raises(ValueError, match="read-only"):
        found[:1] = 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux lists open files")
def test_small_files_are_not_kept_open(tmp_path):
    (tmp_path / "data").write_bytes(bytes(15))
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept = [map_file(tmp_path / "data") for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert len(kept) == 20


def test_a_missing_file_raises_os_error(tmp_path):
    with pytest.raises(OSError, match="absent"):
        map_file(tmp_path / "absent")
    with pytest.raises(OSError, match="absent"):
        HugePageFile(tmp_path / "absent" / "data")
