"""Files of the board cache are executed, so files that other users could have written are not used."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgelm.errors import DeviceError, EdgelmError
from edgelm.kernels.custom_ops import LIBRARIES, CustomOpLibrary
from edgelm.kernels.rewrite.graph_rewriter import DATA
from edgelm.runtime import prepack
from edgelm.runtime.prepack import KERNELS, open_verified
from edgelm.runtime.runner import open_runner
from edgelm.system import board_cache, ownership
from edgelm.system.board_cache import STAMP, BoardCache, CacheKey
from edgelm.system.ownership import find_content_fault, find_path_fault, make_private

NOBODY = 65534
KEY = CacheKey("weights", "digest", "1.31.1", "x86_64 avx2")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")


@pytest.fixture(autouse=True)
def no_logged_faults(monkeypatch):
    monkeypatch.setattr(board_cache, "_logged_faults", set())


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "edgelm")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def cache(tmp_path):
    return BoardCache(tmp_path / "cache")


def put(cache, content=b"1234"):
    return cache.make(KEY, 1, lambda folder: (folder / "a").write_bytes(content) and {})


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_the_cache_is_private_with_any_umask(tmp_path, umask, warnings):
    before = os.umask(umask)
    try:
        cache = BoardCache(tmp_path / "home" / ".cache" / "edgelm")
        entry = put(cache)
        assert cache.prepare_numba_folder() == cache.numba_folder
        cache.update(KEY, {"n": 1})
    finally:
        os.umask(before)
    for folder in (cache.folder, cache.folder.parent, cache.folder.parent.parent, cache.numba_folder, entry.path):
        assert mode(folder) == 0o700
    assert all(not mode(file) & 0o022 for file in entry.path.iterdir())
    assert cache.find(KEY).metadata == {"n": 1}
    assert warnings() == []


def test_numba_s_files_are_private_with_any_umask(tmp_path):
    code = (
        "import os; os.umask(0); import numpy as np; from edgelm.sampling import ranking;"
        "print(ranking.rank_of(np.int32(5)), sum(ranking.rank_of.stats.cache_hits.values()), os.umask(0o22))"
    )
    cache = BoardCache(tmp_path / "cache")
    for hits in (0, 1):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "EDGELM_CACHE_DIR": str(cache.folder)},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert (done.stdout.split(), done.stderr) == (["5", str(hits), "0"], "")
        files = [cache.numba_folder, *cache.numba_folder.rglob("*")]
        assert len(files) > 3
        assert all(not mode(file) & 0o077 for file in files)


def give(path):
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def open_to_all(path):
    path.chmod(path.stat().st_mode | 0o002)


def open_to_group(path):
    path.chmod(path.stat().st_mode | 0o020)


def link_elsewhere(path):
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


WAYS = [pytest.param(give, marks=as_root), open_to_all, open_to_group]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("part", ["the folder", "the entry", "its stamp", "its file"])
def test_an_entry_that_others_could_have_written_is_not_used(cache, warnings, part, way):
    entry = put(cache)
    place = {"the folder": cache.folder, "the entry": entry.path, "its stamp": entry.path / STAMP}
    path = place.get(part, entry.path / "a")
    way(path)
    for _ in range(2):
        assert cache.find(KEY) is None
        assert put(cache, b"other") is None, "it is not made again"
    assert len(warnings()) == 1, "logged once"
    assert str(path) in warnings()[0]
    assert ("65534" if way is give else "mode 0") in warnings()[0]
    assert "EDGELM_CACHE_DIR" in warnings()[0]
    assert (entry.path / "a").read_bytes() == b"1234", "the entry is unchanged"


@pytest.mark.parametrize("part", ["the entry", "its stamp", "its file"])
def test_an_entry_with_a_symbolic_link_is_not_used(cache, warnings, part):
    entry = put(cache)
    link_elsewhere({"the entry": entry.path, "its stamp": entry.path / STAMP}.get(part, entry.path / "a"))
    assert cache.find(KEY) is None
    assert put(cache) is None
    assert len(warnings()) == 1
    assert "symbolic link" in warnings()[0]


@pytest.mark.parametrize("way", [*WAYS, link_elsewhere])
@pytest.mark.parametrize("part", ["the folder", "a folder in it", "a file in it"])
def test_numbas_pickles_that_others_could_have_written_are_not_read(cache, warnings, part, way):
    inner = cache.numba_folder / "sampling_1"
    make_private(inner)
    file = inner / "ranking.rank_of.nbi"
    file.write_bytes(b"pickle")
    assert cache.prepare_numba_folder() == cache.numba_folder
    way({"the folder": cache.numba_folder, "a folder in it": inner}.get(part, file))
    assert cache.prepare_numba_folder() is None
    assert cache.prepare_numba_folder() is None
    assert len(warnings()) == 1, "logged once"
    assert warnings()[0].startswith(str(cache.numba_folder))


def test_without_a_safe_folder_numba_uses_no_other_one(tmp_path):
    """Else it would unpickle files of ~/.cache/numba, which others could have written."""
    home = tmp_path / "home"
    (tmp_path / "cache").mkdir()
    open_to_all(tmp_path / "cache")
    code = "import numpy as np; from edgelm.sampling import ranking; print(ranking.rank_of(np.int32(5)))"
    environment = {**os.environ, "HOME": str(home), "EDGELM_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.stdout == "5\n", done.stderr
    assert done.stderr.count(str(tmp_path / "cache")) >= 1
    assert len(done.stderr.splitlines()) == 1
    assert not home.exists()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_whose_parent_others_can_write_is_not_used(tmp_path, warnings, way):
    parent = tmp_path / "parent"
    parent.mkdir()
    cache = BoardCache(parent / "deep" / "cache")
    put(cache)
    if way is open_to_group:
        os.chown(parent, -1, 1 if os.geteuid() == 0 else -1)
    if way is open_to_group and os.geteuid() != 0:
        pytest.skip("this user's own group may be private")
    way(parent)
    assert cache.find(KEY) is None
    assert f"{parent} " in warnings()[0] or f"{parent}," in warnings()[0]
    before = list(parent.iterdir())
    assert BoardCache(parent / "another").make(KEY, 1, lambda folder: {}) is None
    assert list(parent.iterdir()) == before, "no file is created"


def test_a_sticky_parent_folder_is_safe(tmp_path, warnings):
    parent = tmp_path / "tmp"
    parent.mkdir()
    parent.chmod(0o1777)
    cache = BoardCache(parent / "cache")
    put(cache)
    assert cache.find(KEY) is not None
    assert warnings() == []
    assert BoardCache(parent).find(KEY) is None  # but it is not a cache itself
    assert put(BoardCache(parent)) is None
    assert "everyone" in warnings()[0]


def test_links_in_the_path_are_followed_and_checked(tmp_path, warnings):
    real = tmp_path / "disk" / "cache"
    put(BoardCache(real))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "cache").symlink_to(Path("..") / "link")
    (tmp_path / "link").symlink_to(real)
    cache = BoardCache(tmp_path / "home" / "cache")
    assert cache.find(KEY) is not None
    assert warnings() == []
    open_to_all(tmp_path / "disk")
    assert cache.find(KEY) is None
    assert len(warnings()) == 1
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OSError, match="too many symbolic links"):
        find_path_fault(tmp_path / "circle" / "x")
    assert BoardCache(tmp_path / "circle").find(KEY) is None
    assert put(BoardCache(tmp_path / "circle")) is None


@as_root
def test_a_link_of_another_user_is_not_followed(tmp_path, warnings):
    cache = BoardCache(tmp_path / "cache")
    put(cache)
    (tmp_path / "link").symlink_to(cache.folder)
    give(tmp_path / "link")
    assert BoardCache(tmp_path / "link").find(KEY) is None
    assert "65534" in warnings()[0]


@as_root
def test_a_cache_of_root_serves_other_users(tmp_path, monkeypatch, warnings):
    cache = BoardCache(tmp_path / "cache")
    put(cache)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert cache.find(KEY) is not None
    give(cache.folder / KEY.name)
    assert cache.find(KEY) is None
    assert len(warnings()) == 1


def test_a_private_group_may_write_the_parent_folders_only(tmp_path, monkeypatch):
    folder = tmp_path / "home" / "cache"
    make_private(folder)
    open_to_group(folder.parent)
    monkeypatch.setattr(ownership, "_is_private", lambda path, status: True)
    assert find_path_fault(folder) is None
    open_to_group(folder)
    assert "group" in find_path_fault(folder)
    assert "group" in find_content_fault(folder)


def test_a_named_pipe_is_not_used(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    tmp_path.chmod(0o700)
    assert str(tmp_path / "pipe") in find_content_fault(tmp_path)


# --- the library ---


@pytest.fixture
def small(tiny_checkpoint, export_to_cache, monkeypatch):
    monkeypatch.setattr(prepack, "MIN_CACHED_BYTES", 0)
    monkeypatch.setattr(LIBRARIES, "_shared", {})
    return export_to_cache(tiny_checkpoint(vocab=384, hidden=128, mlp=352), quant="int4")


def logits_of(path, cache):
    session = open_runner(open_verified(path, cache), rows=1, threads=1, cache=cache)
    return session.prefill(0, np.arange(2, 9), 0).copy()


def test_a_library_that_is_not_the_compiled_one_is_never_loaded(small, cache, warnings, monkeypatch):
    """Its size and time are those of the stamp; the hash differs, and is checked before loading."""
    expected = logits_of(small, cache)
    (entry,) = cache.entries()
    library = entry.path / KERNELS
    was, content = library.stat(), bytearray(library.read_bytes())
    content[-1] ^= 0xFF
    library.unlink()
    library.write_bytes(content)
    library.chmod(0o600)
    os.utime(library, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert cache.find(CacheKey(**json.loads((entry.path / STAMP).read_text())["key"])) is not None
    LIBRARIES._shared.clear()  # as in a new process
    loaded = []
    original = CustomOpLibrary.__init__
    monkeypatch.setattr(
        CustomOpLibrary, "__init__", lambda self, *given: (original(self, *given), loaded.append(given))[0]
    )
    np.testing.assert_array_equal(logits_of(small, cache), expected)
    assert len(warnings()) == 1
    assert str(library) in warnings()[0]
    assert hashlib.sha256(content).hexdigest() not in [given[3] for given in loaded]
    (again,) = cache.entries()
    assert again.sha256[KERNELS] == entry.sha256[KERNELS], "it is compiled again"


@pytest.fixture
def compiled(small, cache):
    logits_of(small, cache)
    (entry,) = cache.entries()
    return entry.path / KERNELS, entry.path / DATA, entry.sha256[KERNELS]


def test_the_loaded_library_is_the_hashed_one(compiled, tmp_path, monkeypatch):
    """Also if another file replaces it between hashing and loading, or before onnxruntime opens it again."""
    library, data, digest = compiled
    own = Path(shutil.copy(library, tmp_path / "own.so"))
    real = hashlib.sha256

    def exchange(content):
        own.unlink()
        own.write_bytes(b"another file")
        return real(content)

    monkeypatch.setattr(hashlib, "sha256", exchange)
    operators = CustomOpLibrary(own, [], data, digest)
    assert own.read_bytes() == b"another file"
    maps = Path("/proc/self/maps").read_text()
    assert f"{own} (deleted)" in maps
    options = onnxruntime.SessionOptions()
    with pytest.raises(EdgelmError, match=re.escape(str(own))):
        operators.register(options)


def test_many_libraries_are_distinct_and_keep_no_descriptor(compiled, tmp_path):
    library, data, digest = compiled
    before = len(list(Path("/proc/self/fd").iterdir()))
    made = []
    for number in range(20):
        own = Path(shutil.copy(library, tmp_path / f"{number}.so"))
        made.append(CustomOpLibrary(own, [], data, digest))
        made[-1].register(onnxruntime.SessionOptions())
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
    hooks = {ctypes.cast(each._code.RegisterCustomOps, ctypes.c_void_p).value for each in made}
    assert len(hooks) == len(made), "each is separate code"


def test_a_linked_library_or_one_with_another_hash_is_refused(compiled, tmp_path):
    library, data, digest = compiled
    (tmp_path / "link.so").symlink_to(library)
    with pytest.raises(OSError, match="symbolic link"):
        CustomOpLibrary(tmp_path / "link.so", [], data, digest)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(EdgelmError, match="SHA-256"):
        CustomOpLibrary(library, [], data, "0" * 64)
    with pytest.raises(EdgelmError, match="SHA-256"):
        CustomOpLibrary(library, [], data, "None")
    assert len(list(Path("/proc/self/fd").iterdir())) == opened


# --- the emulated board ---


def test_an_emulated_root_that_others_could_have_written_is_not_used(tmp_path, monkeypatch):
    rootfs = pytest.importorskip("edgelm_devices.rootfs")
    folder = tmp_path / "emulate" / "root"
    folder.mkdir(parents=True)
    monkeypatch.setattr(rootfs, "rootfs_folder", lambda cache: cache / "root")
    open_to_all(folder)
    with pytest.raises(DeviceError, match=f"everyone .*{folder}"):
        rootfs.prepare_rootfs(tmp_path / "emulate", print)
