"""Compiling kernels with Numba, once for this board.

Numba keeps what it compiled by processor, its own version and the source's time of change; here that lies in the board
cache, where a system-wide installation can write too, and a file torn by a power cut is made again instead of ending
the program.

Its files are pickles, so reading one is running it: they are read from the board cache alone, where nobody but this
user and root could have written them, and compiled at every start where that is not so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from edgelm.sampling.importing import import_numba
from edgelm.system.board_cache import BoardCache

_numba = import_numba()
config, njit = _numba.config, _numba.njit

LOG: Final = logging.getLogger(__name__)

_damaged_folders: list[Path] = []
"""Where a damaged file was found and said: once a process."""


def jit(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile for one signature when the module is imported, without the GIL, cached on disk where that can be.

    No fast-math flag is set: contraction and reassociation would make machines differ in the last bit, and nnan and
    ninf would break the -inf of masked logits.
    """

    def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
        folder = BoardCache.default().prepare_numba_folder()
        if folder is None:  # Numba itself would look for another one, whoever writes there
            return _compile_uncached(signature, function)
        with _kept_in(folder):
            try:
                return _compile(signature, function)
            except RuntimeError:  # no directory to write to: compile at every start
                return _compile_uncached(signature, function)
            except Exception:  # noqa: BLE001  whatever unpickling half a file raises
                _remove_kept(function)
                try:
                    return _compile(signature, function)
                except Exception:  # noqa: BLE001  the damaged file cannot be removed
                    return _compile_uncached(signature, function)

    return compile_function


def _compile(signature: str, function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = njit(signature, cache=True, nogil=True)(function)
    return compiled


def _compile_uncached(signature: str, function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = njit(signature, nogil=True)(function)
    return compiled


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Have Numba keep what it compiles in a folder, and other users of Numba in this process have it as they set it.

    Its files are for this user alone meanwhile: Numba writes them with the mode that the umask leaves.
    """
    before, umask = config.CACHE_DIR, os.umask(0o077)
    config.CACHE_DIR = str(folder.absolute())
    try:
        yield
    finally:
        config.CACHE_DIR = before
        os.umask(umask)


def _remove_kept(function: Callable[..., Any]) -> None:
    """Remove what Numba keeps of a function, and say so once."""
    folder = Path(njit(cache=True)(function).stats.cache_path)
    if folder not in _damaged_folders:
        _damaged_folders.append(folder)
        LOG.warning("a compiled kernel in %s is damaged; it is compiled again", folder)
    for file in folder.glob(f"*.{function.__name__}-*.nb?"):
        file.unlink(missing_ok=True)
