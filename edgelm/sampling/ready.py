"""The kernels compiled and kept before anyone wants them, without Numba in this process.

A service whose bundle is greedy may never sample: it goes without Numba's 65 MB until a request has a temperature. What
takes seconds, compiling, is done at its first start on a board, by a child process whose work the board cache keeps;
loading that then takes a third of a second.
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
    """Return when the kernels can be loaded from the board cache; where nothing can be kept, when they are loaded.

    Without Numba there is nothing to compile: a request that samples says what is missing.
    """
    if find_spec("numba") is None:  # a board that never samples goes without
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
            start_new_session=True,  # Ctrl-C at a terminal is not for it
        )
        if done.returncode == 0:
            marker.touch()
            return
        LOG.debug("the kernels were not compiled: %s", done.stderr.decode(errors="replace")[-500:])
    except (OSError, subprocess.TimeoutExpired) as error:
        LOG.debug("the kernels are not kept: %s", error)
    load_kernels()


def _digest() -> str:
    """Return what the compiled kernels belong to: sources, Numba, Python and processor."""
    try:
        numba = version("numba")
    except PackageNotFoundError:
        numba = ""
    parts = [numba, platform.python_version(), platform.machine()]
    parts += [f"{file.name} {file.stat().st_mtime_ns}" for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
