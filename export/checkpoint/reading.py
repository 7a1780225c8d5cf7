"""Files of a checkpoint as text and JSON, and what lies there in their place when a download went wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from edgelm.errors import CheckpointError

PEEK_BYTES: Final = 512
"""Bytes at the start of a file that tell what it is."""

POINTERS: Final = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself: run `git lfs pull` in its"
    " directory, or download the checkpoint with `hf download`",
    b"/annex/objects/": "a git-annex pointer, not the file itself: run `git annex get` in its directory",
}
"""How a file begins that only stands for another one."""

PAGES: Final = (b"<!doctype html", b"<html", b"<head", b"<body")
MESSAGES: Final = (
    b"entry not found",
    b"repository not found",
    b"invalid username or password",
    b"access to model",
    b"access denied",
    b"unauthorized",
)
"""What a hub answers in place of a file, in lower case."""


def check_file_content(file: Path) -> None:
    """Raise `CheckpointError` for a file that is not what its name says: an LFS pointer, a web page, nothing at all.

    A file that is missing or cannot be read is let pass: whoever reads it says so.
    """
    if (
        file.exists() and not file.is_file() and not file.is_dir()
    ):  # a named pipe would keep the reader waiting for ever
        raise CheckpointError(f"{file} is no regular file: download it again")
    try:
        with file.open("rb") as stream:
            start = stream.read(PEEK_BYTES)
    except OSError:
        return
    what = next((told for begins, told in POINTERS.items() if start.startswith(begins)), None)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(PAGES) or (text.startswith(b"<?xml") and b"<html" in text):
        what = "an HTML page, such as a login or error page saved under the file's name: download the file again"
    elif text.startswith(MESSAGES):
        what = f"a message of the server, {start[:60].decode('utf-8', 'replace').strip()!r}: download the file again"
    elif not start:
        what = "an empty file: download it again"
    if what is not None:
        raise CheckpointError(f"{file} is {what}")


def read_text(file: Path) -> str:
    """Return a UTF-8 text, without the byte order mark that some editors put first. Raises `CheckpointError`."""
    check_file_content(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the object in a file; an empty one where `optional` and missing. Raises `CheckpointError`."""
    if optional and not file.is_file():
        return {}
    try:
        value = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value
