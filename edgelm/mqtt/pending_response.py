"""The state of one admitted request: collects the worker's output and merges it into chunks of the response.

`PendingResponse.on_chunk` runs on the worker's thread, everything else on the service's. Does not know the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from edgelm.mqtt.connection import PublishHandle
from edgelm.types import Chunk, Completion


@dataclass(frozen=True, slots=True)
class ResponseUpdated:
    """The worker started a request, or a streamed response has new text."""

    response: PendingResponse


@dataclass(frozen=True, slots=True)
class ResponseFinished:
    """The worker completed a request."""

    response: PendingResponse
    completion: Completion


@dataclass(slots=True, eq=False)
class PendingResponse:
    """A request from its admission to its final message.

    Parameters
    ----------
    key
        Id of the request at the worker, unique in this process.
    id, client, correlation
        Id, client name and correlation data that the client gave.
    model, cancel
        Name of the model, and the function that cancels the request with a given key.
    response_topic
        Topic of the response.
    stream, chunk_ms
        Whether to send chunks, and the least time between two of them.
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
    """Number of the next chunk."""
    is_interrupted: bool = False
    """Whether the request was cancelled because the service stops."""
    _is_started: bool = False
    _last_chunk: PublishHandle | None = None
    """The chunk sent last; until it is written to the socket, new text is merged."""
    _not_before: float = 0.0
    """When the next chunk may be sent, in seconds of `time.monotonic`."""
    _text_parts: list[str] = field(default_factory=list)
    _deltas: deque[str] = field(default_factory=deque)
    _is_posted: bool = False

    def on_chunk(self, chunk: Chunk) -> None:
        """Receive a chunk from the worker. At most one `ResponseUpdated` event is queued at a time."""
        if chunk.delta:
            self._text_parts.append(chunk.delta)
            if self.stream:
                self._deltas.append(chunk.delta)
        if chunk.completion is not None:
            self.post(ResponseFinished(self, chunk.completion))
        elif not self._is_posted and (self._deltas or not self._is_started):
            self._is_posted = True
            self.post(ResponseUpdated(self))

    def mark_started(self) -> bool:
        """Record that a `ResponseUpdated` was handled; return whether it was the first."""
        is_first, self._is_started = not self._is_started, True
        if not self._deltas:
            self._is_posted = False
        return is_first

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._text_parts)

    def due_at(self) -> float:
        """Return when to send the next chunk, in seconds of `time.monotonic`; infinity if there is no new text."""
        return self._not_before if self._deltas else float("inf")

    def is_last_chunk_written(self) -> bool:
        """Return whether the chunk sent last was written to the socket."""
        return self._last_chunk is None or self._last_chunk.is_over

    def take_text(self) -> str:
        """Remove and return all text that was not sent yet."""
        self._is_posted = False  # before the deltas are read: a later delta posts an event again
        parts = []
        while self._deltas:
            parts.append(self._deltas.popleft())
        return "".join(parts)

    def mark_chunk_sent(self, handle: PublishHandle, now: float) -> None:
        """Record that the chunk with number `seq` was passed to the connection."""
        self.seq += 1
        self._last_chunk = handle
        self._not_before = now + self.chunk_ms / 1000

    def mark_chunk_lost(self) -> None:
        """Leave out the number `seq`: the client sees the gap."""
        self.seq += 1

    def put_back(self, text: str) -> None:
        """Keep text that could not be sent for the next chunk."""
        self._deltas.appendleft(text)

    def delay_chunk(self, until: float) -> None:
        """Send the next chunk not before `until`, in seconds of `time.monotonic`."""
        self._not_before = until
