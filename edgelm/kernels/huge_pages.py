"""Files that are mapped in large pages, where the system has them for files.

A processor looks up where a page lies before it reads it, 512 times as often with pages of 4 KB as with pages of 2 MB.
Linux keeps what is written in one go in one piece of its page cache, in file systems that know large folios (ext4 as of
6.16, XFS, Btrfs), and maps such pieces as large pages where the addresses allow it. Elsewhere nothing is lost.
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
"""Bytes of a large page, on x86-64 and on Arm with pages of 4 KB."""


def map_file(file: Path) -> NDArray[np.uint8]:
    """Return a file's bytes, uint8, which cannot be written. Raises `OSError` where it cannot be read.

    A mapping keeps a file descriptor; files of less than a page are read instead.
    """
    with file.open("rb") as opened:
        if file.stat().st_size < HUGE_PAGE_BYTES:
            return np.frombuffer(opened.read(), np.uint8)
        pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that has none
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


class HugePageFile:
    """A file that is written a large page at a time; `offset` is where the next byte goes."""

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
        """How many bytes there are."""
        return self._written + len(self._page)

    def write(self, content: bytes | memoryview) -> None:
        """Append bytes. Raises `OSError` where they find no room."""
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
