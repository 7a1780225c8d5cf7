"""One request being answered: collects what the worker says and gathers it into chunks.

`PendingResponse.sink` runs on the worker's thread, all else on the service's. Knows times and texts, no connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edgelm.mqtt.connection import PublishHandle
from edgelm.types import Chunk, Completion


@dataclass(frozen=True, slots=True)
class ResponseUpdated:
    """An answer began, or a streamed one has text that nobody was told of."""

    response: PendingResponse


@dataclass(frozen=True, slots=True)
class ResponseFinished:
    """The worker is done with a request."""

    response: PendingResponse
    completion: Completion


@dataclass(slots=True, eq=False)
class PendingResponse:
    """A request that the worker has, from its admission to its final.

    Parameters
    ----------
    key
        The worker's name for it, unique in this process.
    id, client, correlation
        The requester's name for it, and for itself.
    model, cancel
        Who answers: its name, and what stops the answer of a key.
    reply_topic
        Where it is answered.
    stream, chunk_ms
        Whether in pieces, and how often at most.
    deadline
        Seconds of `time.monotonic`.
    post
        Receives `ResponseUpdated` and `ResponseFinished`, on the worker's thread.
    """

    key: str
    id: str
    client: str | None
    correlation: bytes | None
    model: str
    cancel: Callable[[str], object]
    response_topic: str
    stream: bool
    chunk_ms: int
    deadline: float
    post: Callable[[ResponseUpdated | ResponseFinished], None]
    seq: int = 0
    is_started: bool = False
    is_interrupted: bool = False
    """It was cancelled because the service stops."""
    last: PublishHandle | None = None
    """The chunk before; until it is on its way, text is merged."""
    not_before: float = 0.0
    """When the next chunk may go out, in seconds of `time.monotonic`."""
    _text_parts: list[str] = field(default_factory=list)
    _deltas: deque[str] = field(default_factory=deque)
    _is_posted: bool = False

    def sink(self, chunk: Chunk) -> None:
        """Take what the worker says. At most one `ResponseUpdated` is under way at a time."""
        if chunk.delta:
            self._text_parts.append(chunk.delta)
            if self.stream:
                self._deltas.append(chunk.delta)
        if chunk.completion is not None:
            self.post(ResponseFinished(self, chunk.completion))
        elif not self._is_posted and (self._deltas or not self.is_started):
            self._is_posted = True
            self.post(ResponseUpdated(self))

    def begin(self) -> bool:
        """Note that `ResponseUpdated` arrived; return whether it was the first."""
        is_first, self.is_started = not self.is_started, True
        if not self._deltas:
            self._is_posted = False
        return is_first

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._text_parts)

    def due_at(self) -> float:
        """When there is a chunk to send, in seconds of `time.monotonic`; infinite where there is none."""
        return self.not_before if self._deltas else float("inf")

    def take(self) -> str:
        """Return all text not told yet."""
        self._is_posted = False  # before the reading: what comes after it is posted again
        parts = []
        while self._deltas:
            parts.append(self._deltas.popleft())
        return "".join(parts)

    def put_back(self, text: str) -> None:
        """Keep text that could not be sent, for the next chunk."""
        self._deltas.appendleft(text)
