"""Compiles kernels with Numba, once for this board.

Numba keys its cache by processor, Numba version and modification time of the source. Here its files lie in the board
cache, which is writable for a system-wide installation too; a damaged file is compiled again and does not end the
program.

The files are pickles: reading one executes it. They are read only from the board cache, which only this user and root
can write. If there is no such folder, kernels are compiled at every start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from edgelm.sampling.numba_import import import_numba
from edgelm.system.board_cache import BoardCache

_numba = import_numba()
config, njit = _numba.config, _numba.njit

LOG: Final = logging.getLogger(__name__)

Kernel = Callable[..., Any]


class KernelCompiler:
    """Compiles functions; reports each folder with damaged files once."""

    def __init__(self) -> None:
        self._damaged_folders: set[Path] = set()

    def jit(self, signature: str) -> Callable[[Kernel], Kernel]:
        """Return a decorator that compiles a function for one signature, without the GIL, cached on disk if possible.

        No fast-math flag is set: contraction and reassociation would make machines differ in the last bit, and nnan
        and ninf would break the -inf of masked logits.
        """

        def compile_function(function: Kernel) -> Kernel:
            folder = BoardCache.default().prepare_numba_folder()
            if folder is None:  # Numba would choose another folder, which other users might write
                return _compile_uncached(signature, function)
            with _numba_cache_in(folder):
                try:
                    return _compile(signature, function)
                except RuntimeError:  # the folder is not writable
                    return _compile_uncached(signature, function)
                except Exception:  # noqa: BLE001  unpickling a damaged file can raise anything
                    self._remove_cached(function)
                    try:
                        return _compile(signature, function)
                    except Exception:  # noqa: BLE001  the damaged file cannot be removed
                        return _compile_uncached(signature, function)

        return compile_function

    def _remove_cached(self, function: Kernel) -> None:
        """Remove the cached files of a function. Logs a warning, once for each folder."""
        folder = Path(njit(cache=True)(function).stats.cache_path)
        if folder not in self._damaged_folders:
            self._damaged_folders.add(folder)
            LOG.warning("a compiled kernel in %s is damaged; it is compiled again", folder)
        for file in folder.glob(f"*.{function.__name__}-*.nb?"):
            file.unlink(missing_ok=True)


jit: Final = KernelCompiler().jit


def _compile(signature: str, function: Kernel) -> Kernel:
    compiled: Kernel = njit(signature, cache=True, nogil=True)(function)
    return compiled


def _compile_uncached(signature: str, function: Kernel) -> Kernel:
    compiled: Kernel = njit(signature, nogil=True)(function)
    return compiled


@contextmanager
def _numba_cache_in(folder: Path) -> Iterator[None]:
    """Make Numba cache in a folder during the block; restore the setting for other users of Numba in this process.

    The umask makes new files readable for this user only.
    """
    before, umask = config.CACHE_DIR, os.umask(0o077)
    config.CACHE_DIR = str(folder.absolute())
    try:
        yield
    finally:
        config.CACHE_DIR = before
        os.umask(umask)
