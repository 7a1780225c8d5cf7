"""Reads a checkpoint's text and JSON files, and detects what a failed download leaves in their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from edgelm.errors import CheckpointError

PEEK_BYTES: Final = 512
"""Bytes at the start of a file that are examined."""

POINTERS: Final = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself: run `git lfs pull` in its"
    " directory, or download the checkpoint with `hf download`",
    b"/annex/objects/": "a git-annex pointer, not the file itself: run `git annex get` in its directory",
}
"""The first bytes of pointer files."""

PAGES: Final = (b"<!doctype html", b"<html", b"<head", b"<body")
MESSAGES: Final = (
    b"entry not found",
    b"repository not found",
    b"invalid username or password",
    b"access to model",
    b"access denied",
    b"unauthorized",
)
"""Answers of a hub in place of a file, in lower case."""


def check_file_content(file: Path) -> None:
    """Raise `CheckpointError` for a file with other content than its name says: a pointer, a web page, or no content.

    A file that is missing or unreadable passes; reading it raises.
    """
    if file.exists() and not file.is_file() and not file.is_dir():  # opening a named pipe would block
        raise CheckpointError(f"{file} is not a regular file: download it again")
    try:
        with file.open("rb") as stream:
            start = stream.read(PEEK_BYTES)
    except OSError:
        return
    what = next((meaning for begins, meaning in POINTERS.items() if start.startswith(begins)), None)
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
    """Return a UTF-8 text without a byte order mark, which some editors add. Raises `CheckpointError`."""
    check_file_content(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return a file's JSON object; an empty one if the file is missing and `optional`. Raises `CheckpointError`."""
    if optional and not file.is_file():
        return {}
    try:
        value = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value
