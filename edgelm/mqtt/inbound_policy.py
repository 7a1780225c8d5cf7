"""Decides which received messages are admitted, rejected or dropped, before they are parsed.

`decide` runs on paho's thread, once for each message when its topic has arrived; `release` on the owner's. Knows topics
and sizes, not payloads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edgelm.errors import RequestError
from edgelm.mqtt.backlog_limit import MESSAGE_BYTES, BacklogLimit
from edgelm.mqtt.packet_filter import Verdict
from edgelm.mqtt.rate_limit import ClientRateLimits, TokenBucket
from edgelm.mqtt.topics import BoardTopics

BACKLOG_BYTES: Final = 16 * 1024 * 1024
"""Maximum backlog; beyond it messages of QoS 0 are dropped."""
CLIENT_BACKLOG_BYTES: Final = BACKLOG_BYTES // 4
"""The same for one client."""
ALL_CLIENTS_FACTOR: Final = 4
"""Rate of all clients together, in rates of one client. Beyond it each client may have one message in the backlog."""
BYTES_PER_EXTRA_REQUEST: Final = 4096
"""This many bytes of a message count as one more request."""
REJECTION_RATE: Final = 25.0
REJECTION_BURST: Final = 80.0
"""Requests beyond a client's rate that are rejected: rate per second, and burst. Further ones are dropped silently."""
ALL_REJECTIONS_RATE: Final = 100.0
ALL_REJECTIONS_BURST: Final = 200.0
"""The same for all clients together."""
OWN_TOPICS_RATE: Final = 5.0
"""Messages a second on the board's own retained topics that are admitted."""
MAX_RECENT_TOPICS: Final = 8192
NEW_TOPICS_PAUSE_S: Final = 0.005
"""How long messages of QoS 0 on new topics are dropped after one exceeded the rates."""


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """The decision about a message that passed.

    Parameters
    ----------
    client
        The client's name in the topic, or None.
    backlog_bytes
        Bytes counted in the backlog.
    retry_after_s
        Seconds after which the client may send again if the message exceeds its rate, otherwise None.
    """

    client: str | None
    backlog_bytes: int
    retry_after_s: float | None = None


DEFAULT_DECISION: Final = PolicyDecision(None, 0)
"""The decision about a message if there is no policy."""


class InboundPolicy:
    """Decides about the messages that one board receives.

    Parameters
    ----------
    topics
        Topics of the board.
    rate, burst
        Requests a second of one client, and at once; each `BYTES_PER_EXTRA_REQUEST` of a message count as one more.
    packet_bytes
        Maximum packet size; larger ones are dropped.
    clock
        Returns monotonic seconds.
    """

    def __init__(
        self, topics: BoardTopics, rate: float, burst: float, packet_bytes: int, clock: Callable[[], float]
    ) -> None:
        self._topics = topics
        self._packet_bytes = packet_bytes
        self._clock = clock
        self._backlog = BacklogLimit(BACKLOG_BYTES, CLIENT_BACKLOG_BYTES)
        self._requests = ClientRateLimits(rate, burst)
        self._all_requests = TokenBucket(ALL_CLIENTS_FACTOR * rate, ALL_CLIENTS_FACTOR * burst)
        self._cancels = ClientRateLimits(rate, burst)
        self._rejections = ClientRateLimits(REJECTION_RATE, REJECTION_BURST)
        self._all_rejections = TokenBucket(ALL_REJECTIONS_RATE, ALL_REJECTIONS_BURST)
        self._own_topics = TokenBucket(OWN_TOPICS_RATE, 2 * OWN_TOPICS_RATE)
        self._fixed_topics: dict[bytes, tuple[str, str | None]] = {
            topics.generate().encode(): ("generate", None),
            topics.cancel().encode(): ("cancel", None),
            topics.status.encode(): ("own", None),
            topics.info.encode(): ("own", None),
        }
        self._recent_topics: OrderedDict[bytes, tuple[str, str | None]] = OrderedDict()
        """Action and client of admitted topics, the least recently used first."""
        self._new_topics_blocked_until = float("-inf")
        """Until then messages of QoS 0 on topics not in `_recent_topics` are dropped without parsing the topic."""
        self._decisions: deque[PolicyDecision] = deque()
        self._dropped = 0
        self._lock = threading.Lock()
        self._was_own_dropped = False
        """Whether a message on the board's own topics was dropped since `pop_own_dropped`."""

    @property
    def dropped(self) -> int:
        """Number of messages that were dropped."""
        return self._dropped

    def count_dropped(self, count: int = 1) -> None:
        """Count messages that were dropped by the packet filter or the rejection queue."""
        with self._lock:
            self._dropped += count

    def release_pending(self) -> None:
        """Release messages that passed but were not received completely: the connection is lost."""
        while self._decisions:
            decision = self._decisions.popleft()
            self.release(decision)

    def decide(self, topic: bytes, qos: int, size: int) -> Verdict:
        """Decide about a message; `pop_decision` returns the decision about one that passes."""
        now = self._clock()
        target = self._fixed_topics.get(topic) or self._recent_topics.get(topic)
        if target is None:
            if qos == 0 and now < self._new_topics_blocked_until:
                self._dropped += 1
                return Verdict.DROP
            target = self._parse_topic(topic)
        action, client = target
        backlog_bytes = size + MESSAGE_BYTES
        if action == "own":
            if self._own_topics.try_take(now):
                return self._admit(PolicyDecision(client, backlog_bytes), qos)
            self._was_own_dropped = True
        elif size > self._packet_bytes:
            pass
        elif action == "cancel":
            if self._cancels.try_take(client, now, is_qos1=qos > 0):
                return self._admit(PolicyDecision(client, backlog_bytes), qos, topic, target)
        elif self._try_take_request(client, qos, size, now):
            return self._admit(PolicyDecision(client, backlog_bytes), qos, topic, target)
        elif self._rejections.try_take(client, now, is_qos1=qos > 0) and self._all_rejections.try_take(now):
            return self._admit(PolicyDecision(client, backlog_bytes, self._requests.wait_s(client, now)), qos)
        elif topic not in self._recent_topics and topic not in self._fixed_topics:
            self._new_topics_blocked_until = now + NEW_TOPICS_PAUSE_S
        return self._drop()

    def pop_decision(self) -> PolicyDecision | None:
        """Remove and return the decision about the oldest message that passed; None if there is none."""
        return self._decisions.popleft() if self._decisions else None

    def pop_own_dropped(self) -> bool:
        """Return whether a message on the board's own topics was dropped since the last call."""
        was_dropped, self._was_own_dropped = self._was_own_dropped, False
        return was_dropped

    def release(self, decision: PolicyDecision) -> None:
        """Remove a message from the backlog."""
        if decision.backlog_bytes:
            self._backlog.release(decision.backlog_bytes, decision.client)

    def _try_take_request(self, client: str | None, qos: int, size: int, now: float) -> bool:
        """Return whether the client may send a request now.

        While all clients together exceed their common rate, each may have one message in the backlog.
        """
        cost = 1 + size // BYTES_PER_EXTRA_REQUEST
        if not self._requests.try_take(client, now, cost, is_qos1=qos > 0):
            return False
        return self._all_requests.try_take(now, cost) or not self._backlog.has_messages(client)

    def _parse_topic(self, topic: bytes) -> tuple[str, str | None]:
        """Return a topic's action and client; "generate" and None if the topic is malformed."""
        try:
            parsed = self._topics.parse(topic.decode("utf-8"))
        except (UnicodeDecodeError, RequestError):
            return "generate", None
        return parsed.action, parsed.client

    def _admit(
        self,
        decision: PolicyDecision,
        qos: int,
        topic: bytes | None = None,
        target: tuple[str, str | None] | None = None,
    ) -> Verdict:
        """Let a message pass if the backlog allows it, and store its topic if one is given."""
        if not self._backlog.try_add(decision.backlog_bytes, qos, decision.client):
            return self._drop()
        if topic is not None and target is not None and topic not in self._fixed_topics:
            self._recent_topics[topic] = target
            self._recent_topics.move_to_end(topic)
            if len(self._recent_topics) > MAX_RECENT_TOPICS:
                self._recent_topics.popitem(last=False)
        self._decisions.append(decision)
        return Verdict.PASS

    def _drop(self) -> Verdict:
        self.count_dropped()
        return Verdict.DROP
