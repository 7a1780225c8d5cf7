"""The board cache returns complete entries or none, also with damaged files and concurrent writers."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.cli import main
from edgelm.errors import EdgelmError
from edgelm.system.board_cache import (
    ABANDONED_AFTER_S,
    CACHE_DIR_VARIABLE,
    LIMIT_VARIABLE,
    STAMP,
    UNUSED_AFTER_S,
    BoardCache,
    CacheKey,
    describe_cpu,
)

KEY = CacheKey("weights", "digest", "1.31.1", "x86_64 avx2")
contents = st.dictionaries(st.sampled_from(["a", "b.data", "c"]), st.binary(min_size=1, max_size=50), min_size=1)


def put(cache, key, files, metadata=None):
    def fill(folder):
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return metadata or {"who": "test"}

    return cache.make(key, 1, fill)


def read(entry):
    return {file.name: file.read_bytes() for file in entry.path.iterdir() if file.name != STAMP}


def leftovers(cache):
    return [path for path in cache.folder.iterdir() if path.name.startswith(".")]


@pytest.fixture
def cache(tmp_path):
    return BoardCache(tmp_path / "cache")


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "edgelm")
    return lambda: [record.getMessage() for record in caplog.records]


@given(files=contents)
def test_an_entry_is_read_as_it_was_written(tmp_path_factory, files):
    cache = BoardCache(tmp_path_factory.mktemp("cache"))
    assert cache.find(KEY) is None
    made = put(cache, KEY, files, {"n": 1})
    found = cache.find(KEY)
    assert made.path == found.path
    assert read(found) == files
    assert found.metadata == {"n": 1}
    assert not leftovers(cache)
    again = put(cache, KEY, files)  # as if another process had been faster
    assert again.path == made.path
    assert read(again) == files
    assert not leftovers(cache)


@given(files=contents, data=st.data())
def test_an_entry_with_a_changed_file_is_removed(tmp_path_factory, files, data):
    cache = BoardCache(tmp_path_factory.mktemp("cache"))
    entry = put(cache, KEY, files)
    name = data.draw(st.sampled_from(sorted([*files, STAMP])))
    file = entry.path / name
    before = file.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "flipped", "gone"]))
    at = data.draw(st.integers(0, len(before) - 1))
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(before[:at])
    else:
        file.write_bytes(before[:at] + bytes([before[at] ^ 0xFF]) + before[at + 1 :])
        os.utime(file, ns=(1, 1))  # the clock of a file system may be coarse
    found = cache.find(KEY)
    assert found is None
    assert not (cache.folder / KEY.name).exists()
    assert not leftovers(cache)
    assert read(put(cache, KEY, files)) == files


def test_a_copied_entry_is_valid(cache, tmp_path):
    put(cache, KEY, {"a": b"1234"})
    shutil.copytree(cache.folder, tmp_path / "copy", copy_function=shutil.copy)  # with new modification times
    assert read(BoardCache(tmp_path / "copy").find(KEY)) == {"a": b"1234"}


@pytest.mark.parametrize("field", ["kind", "bundle", "runtime", "cpu"])
def test_an_entry_is_valid_for_its_key_only(cache, warnings, field):
    entry = put(cache, KEY, {"a": b"1234"})
    other = CacheKey(**{**{name: getattr(KEY, name) for name in KEY.__slots__}, field: "other"})
    assert cache.find(other) is None
    assert warnings() == []
    entry.path.rename(cache.folder / other.name)
    assert cache.find(other) is None
    assert len(warnings()) == 1, warnings()
    assert field in warnings()[0]
    assert cache.find(other) is None
    assert len(warnings()) == 1, "logged once"


def test_a_failure_leaves_no_files(cache):
    def fill(folder):
        (folder / "a").write_bytes(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cache.make(KEY, 1, fill)
    assert list(cache.folder.iterdir()) == []


def _race(folder, number, barrier):
    cache = BoardCache(Path(folder))
    barrier.wait()
    for _ in range(20):
        entry = put(cache, KEY, {"a": b"x" * 10_000}, {"number": number})
        assert read(entry) == {"a": b"x" * 10_000}
        found = cache.find(KEY)
        assert found is None or read(found) == {"a": b"x" * 10_000}


def test_writers_do_not_disturb_each_other(cache):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_race, args=(str(cache.folder), number, barrier)) for number in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert not leftovers(cache)
    assert read(cache.find(KEY)) == {"a": b"x" * 10_000}


def test_a_folder_that_cannot_be_written_is_logged_and_not_used(tmp_path, warnings):
    file = tmp_path / "file"
    file.write_text("not a folder")
    cache = BoardCache(file / "cache")
    assert cache.find(KEY) is None
    assert put(cache, KEY, {"a": b"1"}) is None
    assert len(warnings()) == 1
    assert str(cache.folder) in warnings()[0]
    assert list(cache.entries()) == []
    assert cache.clear() == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; run as a user")
def test_a_read_only_folder_can_be_read(cache, warnings):
    put(cache, KEY, {"a": b"1234"})
    cache.folder.chmod(0o500)
    try:
        assert read(cache.find(KEY)) == {"a": b"1234"}
        assert put(cache, CacheKey("weights", "other", "1", "c"), {"a": b"1"}) is None
    finally:
        cache.folder.chmod(0o700)
    assert len(warnings()) == 1


def test_a_full_disk_is_logged_with_the_needed_size(cache, warnings):
    assert cache.make(KEY, 10**18, lambda _folder: pytest.fail("the disk is full")) is None
    assert "1000000000000 MB" in warnings()[0]


def test_old_entries_are_removed_and_other_files_kept(cache):
    old, young = (CacheKey("weights", name, "1", "c") for name in ("old", "young"))
    unused = put(cache, old, {"a": b"1"})
    put(cache, young, {"a": b"2"})
    (cache.folder / "mine").mkdir()
    (cache.folder / "mine" / "letter").write_text("dear")
    torn = cache.folder / ".making-torn"
    torn.mkdir()
    now = time.time()
    os.utime(unused.path / STAMP, (now - UNUSED_AFTER_S - 10, now - UNUSED_AFTER_S - 10))
    os.utime(torn, (now - ABANDONED_AFTER_S - 10, now - ABANDONED_AFTER_S - 10))
    put(cache, KEY, {"a": b"3"})
    assert {entry.path.name for entry in cache.entries()} == {young.name, KEY.name}
    assert not leftovers(cache)
    assert cache.clear() > 0
    assert [path.name for path in cache.folder.iterdir()] == ["mine"]


def test_the_metadata_of_an_entry_can_be_replaced(cache):
    put(cache, KEY, {"a": b"1"}, {"n": 1})
    cache.update(KEY, {"n": 2})
    found = cache.find(KEY)
    assert found.metadata == {"n": 2}
    assert read(found) == {"a": b"1"}
    cache.update(CacheKey("weights", "none", "1", "c"), {"n": 2})


def test_the_command_lists_and_clears(cache, monkeypatch, capsys):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(cache.folder))
    put(cache, KEY, {"a": b"x" * 2_000_000}, {"bundle": "my/bundle"})
    cache.numba_folder.mkdir()
    (cache.numba_folder / "kernel.nbi").write_bytes(b"y" * 1_000_000)
    assert main(["cache", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (entry,) = printed["entries"]
    assert (entry["kind"], entry["of"], printed["kernels_bytes"]) == ("weights", "my/bundle", 1_000_000)
    assert entry["bytes"] >= 2_000_000
    assert main(["cache"]) == 0
    assert "my/bundle" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert "3.0 MB" in capsys.readouterr().out
    assert list(cache.folder.iterdir()) == []
    assert main(["cache", "--clear"]) == 0
    assert "0.0 MB" in capsys.readouterr().out


def test_a_used_entry_is_kept(cache):
    entry = put(cache, KEY, {"a": b"1"})
    long_ago = time.time() - UNUSED_AFTER_S - 10
    os.utime(entry.path / STAMP, (long_ago, long_ago))
    cache.find(KEY)
    put(cache, CacheKey("weights", "other", "1", "c"), {"a": b"1"})
    assert cache.find(KEY) is not None


def test_the_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_DIR_VARIABLE, str(tmp_path))
    assert BoardCache.default().folder == tmp_path
    monkeypatch.setenv(CACHE_DIR_VARIABLE, "")
    with pytest.raises(EdgelmError, match=CACHE_DIR_VARIABLE):
        BoardCache.default()
    monkeypatch.delenv(CACHE_DIR_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert BoardCache.default().folder == tmp_path / "xdg" / "edgelm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert BoardCache.default().folder == tmp_path / ".cache" / "edgelm"


def test_a_cpu_is_described_by_its_instruction_sets(tmp_path):
    (tmp_path / "proc").mkdir()
    info = tmp_path / "proc" / "cpuinfo"
    seen = set()
    for text in ("flags : avx2 vnni\ncpu MHz : 1\n", "flags : avx2\ncpu MHz : 1\n", "Features : asimddp\n"):
        info.write_text(text)
        seen.add(describe_cpu(tmp_path))
    info.write_text("flags : avx2\ncpu MHz : 2\nflags : avx2\ncpu MHz : 3\n")
    assert describe_cpu(tmp_path) in seen, "the clock rate is ignored"
    assert len(seen) == 3
    assert describe_cpu(tmp_path / "nowhere")
    assert json.dumps(describe_cpu())


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=15),
    limit_kb=st.integers(0, 120),
)
def test_the_least_recently_used_entry_is_removed_first(tmp_path_factory, steps, limit_kb):
    """Compared with a model: entries in the order of their last use, removed from the front until the rest fits."""
    cache = BoardCache(tmp_path_factory.mktemp("cache"))
    clock = time.time() - 10_000
    order: dict[int, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LIMIT_VARIABLE, str(limit_kb / 1000))
        for is_read, which, kilobytes in steps:
            key = CacheKey("weights", str(which), "r", "c")
            if is_read:
                assert (cache.find(key) is None) == (which not in order)
            elif which not in order:
                entry = put(cache, key, {"a": bytes(1000 * kilobytes)})
                order[which] = sum(file.stat().st_size for file in entry.path.iterdir())
                others = [other for other in order if other != which]
                while others and sum(order.values()) > 1000 * limit_kb:
                    del order[others.pop(0)]
            if which in order:
                order[which] = order.pop(which)
                clock += 1
                os.utime(cache.folder / key.name / STAMP, (clock, clock))
            assert {entry.path.name for entry in cache.entries()} == {
                CacheKey("weights", str(other), "r", "c").name for other in order
            }
    assert not leftovers(cache)


@pytest.mark.parametrize("wrong", ["", "many", "-1", "nan", "1e12"])
def test_an_invalid_limit_is_a_one_line_error(wrong, monkeypatch, capsys):
    monkeypatch.setenv(LIMIT_VARIABLE, wrong)
    assert main(["cache"]) == 1
    err = capsys.readouterr().err
    assert LIMIT_VARIABLE in err
    assert err.count("\n") == 1
