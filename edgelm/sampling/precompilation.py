"""Compiles the kernels into the board cache before the first request, without loading Numba in this process.

A service with a greedy bundle may never sample, and does not load Numba (65 MB) until a request has a temperature.
Compiling takes seconds: a child process does it at the first start on a board. Loading from the cache then takes a
third of a second.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from edgelm.sampling.sampler import load_kernels
from edgelm.system.board_cache import BoardCache
from edgelm.system.isolated_python import build_python_command

LOG: Final = logging.getLogger(__name__)

COMPILE_TIMEOUT_S: Final = 300.0


def ensure_compiled() -> None:
    """Compile the kernels into the board cache, or load them here if the cache cannot hold them.

    Without Numba this does nothing: a request that needs kernels fails with an error that names the missing package.
    """
    if find_spec("numba") is None:
        return
    folder = BoardCache.default().prepare_numba_folder()
    if folder is None:
        load_kernels()
        return
    marker = folder / f"compiled-{_digest()}"
    if marker.exists():
        return
    try:
        done = subprocess.run(
            build_python_command("edgelm.sampling", "load_kernels"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
            start_new_session=True,  # so that Ctrl-C in a terminal does not stop it
        )
        if done.returncode == 0:
            marker.touch()
            return
        LOG.debug("the kernels were not compiled: %s", done.stderr.decode(errors="replace")[-500:])
    except (OSError, subprocess.TimeoutExpired) as error:
        LOG.debug("the kernels were not cached: %s", error)
    load_kernels()


def _digest() -> str:
    """Return a digest of everything that compiled kernels depend on: sources, Numba, Python and processor."""
    try:
        numba = version("numba")
    except PackageNotFoundError:
        numba = ""
    parts = [numba, platform.python_version(), platform.machine()]
    parts += [f"{file.name} {file.stat().st_mtime_ns}" for file in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
