"""Stop strings: ends a text before the first of them, and never returns a part of one. Knows nothing of tokens."""

from __future__ import annotations


class StopFilter:
    """Passes text up to the first stop string, and holds back text that may be the start of one.

    Parameters
    ----------
    stop
        Non-empty strings.

    Attributes
    ----------
    matched
        Whether a stop string was found; no text passes afterwards.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.matched = False
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""

    def push(self, text: str) -> str:
        """Add text; return the part that is final."""
        if self.matched:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.matched = True
            self._held = ""
            return text[: min(ends)[1]]
        keep = self._count_held(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return the held text: it did not become a stop string."""
        held, self._held = self._held, ""
        return held

    def _count_held(self, text: str) -> int:
        """Return the length of the longest suffix of the text that is a prefix of a stop string."""
        for count in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-count:]
            if any(stop.startswith(end) for stop in self._stop):
                return count
        return 0
