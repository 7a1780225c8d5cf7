r"""Text for a terminal: control characters of others are shown, never obeyed.

What a model, a bundle, a checkpoint, a broker or another board says may hold escape sequences, which a terminal obeys:
they retitle the window, erase what was said, or answer in the user's place. Each character that could begin or be part
of one is shown as Python writes it, `\x1b`; so are those that reorder a line of text. As each stands for itself, a
sequence that arrives in two pieces is shown like one that arrives whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TextIO, cast

UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0 but tab and line feed, DEL, C1), those that override the direction of writing, and surrogates,
which stand for bytes of a file's name that are no text."""


def escape_controls(text: str) -> str:
    r"""Return a text with its control characters as visible escapes, such as `\x1b` and `\u202e`."""
    return UNSAFE.sub(_escape, text)


def escape_line(text: str) -> str:
    """Return a text as `escape_controls`, its line feeds too: it cannot pass for more than one line of a log."""
    return escape_controls(text).replace("\n", "\\n")


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class EscapingStream:
    """A text stream that writes what it is given as `escape_controls`. Everything else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream
        """The stream itself, for control sequences of ours."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def write(self, text: str) -> int:
        """Write a text as `escape_controls`; return its length."""
        self.raw.write(escape_controls(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write each line as `escape_controls`."""
        for line in lines:
            self.write(line)


def unwrap_stream(stream: TextIO) -> TextIO:
    """Return the stream behind an `EscapingStream`; only our own control sequences and escaped text may go there."""
    return stream.raw if isinstance(stream, EscapingStream) else stream


@contextmanager
def escape_output(*, raw_stdout: bool) -> Iterator[None]:
    """Have standard output and standard error show control characters while the block runs.

    With `raw_stdout` standard output is left alone where it is no terminal: who reads an answer from a pipe
    gets the model's own characters. Standard error, which holds no data, always shows them.
    """
    before = sys.stdout, sys.stderr
    if not raw_stdout or before[0].isatty():
        sys.stdout = cast(TextIO, EscapingStream(before[0]))
    sys.stderr = cast(TextIO, EscapingStream(before[1]))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
