"""Files that can be mapped as huge pages, if the system supports that for files.

With pages of 2 MB the processor needs 512 times fewer address translations than with pages of 4 KB. On file systems
with large folios (ext4 since Linux 6.16, XFS, Btrfs), Linux keeps the data of one write in one piece of the page cache,
and maps aligned pieces as huge pages. On other systems the files are ordinary files.
"""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

HUGE_PAGE_BYTES: Final = 1 << 21
"""Bytes of a huge page on x86-64, and on Arm with pages of 4 KB."""


def map_file(file: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file, uint8 [n], read-only. Raises `OSError` if the file cannot be read.

    A mapping keeps a file descriptor open. Files smaller than a huge page are read instead.
    """
    with file.open("rb") as opened:
        if file.stat().st_size < HUGE_PAGE_BYTES:
            return np.frombuffer(opened.read(), np.uint8)
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


class HugePageFile:
    """A file for writing that passes whole huge pages to the system, one write each."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._page = bytearray()
        self._written = 0

    def __enter__(self) -> HugePageFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._file:
            if error is None:
                self._write(len(self._page))

    @property
    def offset(self) -> int:
        """Number of bytes written so far: the offset of the next byte."""
        return self._written + len(self._page)

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes. Raises `OSError`, for instance if the disk is full."""
        left = memoryview(content).cast("B")
        while len(left):
            room = HUGE_PAGE_BYTES - len(self._page)
            self._page += left[:room]
            left = left[room:]
            if len(self._page) == HUGE_PAGE_BYTES:
                self._write(HUGE_PAGE_BYTES)

    def _write(self, size: int) -> None:
        page = memoryview(self._page)
        done = 0
        while done < size:
            done += self._file.write(page[done:size]) or 0
        page.release()
        self._written += size
        self._page.clear()
