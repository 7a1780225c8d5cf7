r"""Escapes control characters in text for a terminal.

Text from a model, bundle, checkpoint, broker or another board may contain escape sequences, which a terminal executes:
they change the window title, erase output, or send input as if the user had typed it. Each control character, and each
one that reorders a line, is written as an escape such as `\x1b`. Characters are escaped one by one, so a sequence that
arrives in two pieces is escaped too.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO, cast

UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 controls except tab and line feed, DEL, C1 controls, bidirectional overrides, and surrogates, which stand for
bytes of a file name that are not UTF-8."""


def escape_controls(text: str) -> str:
    r"""Return a text with control characters as visible escapes, such as `\x1b` and `\u202e`."""
    return UNSAFE.sub(_escape, text)


def escape_line(text: str) -> str:
    """Return the same with line feeds escaped too, so that a text cannot look like several lines of a log."""
    return escape_controls(text).replace("\n", "\\n")


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class EscapingStream:
    """A text stream that escapes control characters on writing; other operations are the wrapped stream's."""

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream
        """The wrapped stream, for our own control sequences."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def write(self, text: str) -> int:
        """Write the escaped text; return the length of `text`."""
        self.raw.write(escape_controls(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line escaped."""
        for line in lines:
            self.write(line)


def unwrap_stream(stream: TextIO) -> TextIO:
    """Return the stream behind an `EscapingStream`; only our own control sequences and escaped text may go there."""
    return stream.raw if isinstance(stream, EscapingStream) else stream


@contextmanager
def escape_output(*, raw_stdout: bool) -> Iterator[None]:
    """Escape control characters on standard output and standard error while the block runs.

    With `raw_stdout` standard output is escaped only if it is a terminal: a program that reads from a pipe gets the
    model's own characters. Standard error is always escaped.
    """
    stdout, stderr = sys.stdout, sys.stderr
    if not raw_stdout or stdout.isatty():
        sys.stdout = cast(TextIO, EscapingStream(stdout))
    sys.stderr = cast(TextIO, EscapingStream(stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr
