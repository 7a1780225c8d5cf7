"""What comes in: which messages of which client are taken, refused or dropped, before they are parsed.

`decide` runs on paho's thread, once for each message as its topic comes in; `release` on the owner's. Knows topics and
sizes, not what messages say.
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
"""What may wait for the owner; beyond it messages of QoS 0 are dropped."""
CLIENT_BACKLOG_BYTES: Final = BACKLOG_BYTES // 4
"""The same for one client."""
ALL_CLIENTS_FACTOR: Final = 4
"""How many clients' rates all together may reach before each may have one request waiting."""
BYTES_PER_EXTRA_REQUEST: Final = 4096
"""So many bytes of a message count as one request more."""
REFUSED_RATE: Final = 25.0
REFUSED_BURST: Final = 80.0
"""How many requests beyond its rate a client is told of, a second and at once; the others are dropped in silence."""
ALL_REFUSED_RATE: Final = 100.0
ALL_REFUSED_BURST: Final = 200.0
"""The same for all clients together."""
OWN_RATE: Final = 5.0
"""Messages a second on the board's own retained topics that are looked at."""
REMEMBERED_TOPICS: Final = 8192
NEW_TOPICS_PAUSE_S: Final = 0.005
"""How long new names are not looked at after one too many."""


@dataclass(frozen=True, slots=True)
class PolicyDecision:
    """What was decided of a message that passed.

    Parameters
    ----------
    client
        Whose it is: the name in its topic, or None.
    cost
        Bytes that it is counted with.
    retry_after_s
        When the client may ask again, where it asks too often; None where it may now.
    """

    client: str | None
    cost: int
    retry_after_s: float | None = None


DEFAULT_DECISION: Final = PolicyDecision(None, 0)
"""The ticket of a message that nobody judged."""


class InboundPolicy:
    """Judges the messages that come to one board.

    Parameters
    ----------
    topics
        The board's.
    rate, burst
        Requests a second of one client, and at once; `BYTES_PER_EXTRA_REQUEST` of a message count as one more.
    packet_bytes
        The largest packet that is taken.
    clock
        Seconds that do not go back.
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
        self._refused = ClientRateLimits(REFUSED_RATE, REFUSED_BURST)
        self._all_refused = TokenBucket(ALL_REFUSED_RATE, ALL_REFUSED_BURST)
        self._own = TokenBucket(OWN_RATE, 2 * OWN_RATE)
        self._fixed: dict[bytes, tuple[str, str | None]] = {
            topics.generate().encode(): ("generate", None),
            topics.cancel().encode(): ("cancel", None),
            topics.status.encode(): ("own", None),
            topics.info.encode(): ("own", None),
        }
        self._known: OrderedDict[bytes, tuple[str, str | None]] = OrderedDict()
        """What topics that were admitted are for, and whose; the one used longest ago first."""
        self._new_topics_blocked_until = float("-inf")
        """Until when messages of QoS 0 on other topics are dropped unread: there are too many new names."""
        self._decisions: deque[PolicyDecision] = deque()
        self._dropped = 0
        self._lock = threading.Lock()
        self.is_overwritten = False
        """Whether a message on the board's own topics was dropped unseen; reset by the owner."""

    @property
    def dropped(self) -> int:
        """Messages that were dropped in silence."""
        return self._dropped

    def count_dropped(self, count: int = 1) -> None:
        """Count some that were dropped elsewhere."""
        with self._lock:
            self._dropped += count

    def release_pending(self) -> None:
        """Forget what passed and did not arrive: its connection is gone."""
        while self._decisions:
            decision = self._decisions.popleft()
            self.release(decision)

    def decide(self, topic: bytes, qos: int, size: int) -> Verdict:
        """Decide what becomes of a message; the ticket of one that passes follows by `decision`."""
        now = self._clock()
        known = self._fixed.get(topic) or self._known.get(topic)
        if known is None:
            if qos == 0 and now < self._new_topics_blocked_until:
                self._dropped += 1
                return Verdict.DROP
            known = self._look_up(topic)
        action, client = known
        cost = size + MESSAGE_BYTES
        if action == "own":
            if self._own.try_take(now):
                return self._admit(PolicyDecision(client, cost), qos)
            self.is_overwritten = True
        elif size > self._packet_bytes:
            pass
        elif action == "cancel":
            if self._cancels.try_take(client, now, is_qos1=qos > 0):
                return self._admit(PolicyDecision(client, cost), qos, topic, known)
        elif self._try_take_request(client, qos, size, now):
            return self._admit(PolicyDecision(client, cost), qos, topic, known)
        elif self._refused.try_take(client, now, is_qos1=qos > 0) and self._all_refused.try_take(now):
            return self._admit(PolicyDecision(client, cost, self._requests.wait_s(client, now)), qos)
        elif topic not in self._known and topic not in self._fixed:
            self._new_topics_blocked_until = now + NEW_TOPICS_PAUSE_S
        return self._drop()

    def decision(self) -> PolicyDecision | None:
        """Return the ticket of the message that has arrived next; None where nobody judged it."""
        return self._decisions.popleft() if self._decisions else None

    def release(self, decision: PolicyDecision) -> None:
        """Free the place of a message."""
        if decision.cost:
            self._backlog.release(decision.cost, decision.client)

    def _try_take_request(self, client: str | None, qos: int, size: int, now: float) -> bool:
        """Whether a client may ask now. Where all together ask too much, each may have one request waiting here."""
        cost = 1 + size // BYTES_PER_EXTRA_REQUEST
        if not self._requests.try_take(client, now, cost, is_qos1=qos > 0):
            return False
        return self._all_requests.try_take(now, cost) or not self._backlog.has_messages(client)

    def _look_up(self, topic: bytes) -> tuple[str, str | None]:
        """Return what a topic is for, and the client that it names; one that names it in a wrong way has none."""
        try:
            address = self._topics.parse(topic.decode("utf-8"))
        except (UnicodeDecodeError, RequestError):
            return "generate", None
        return address.action, address.client

    def _admit(
        self,
        decision: PolicyDecision,
        qos: int,
        topic: bytes | None = None,
        known: tuple[str, str | None] | None = None,
    ) -> Verdict:
        """Let a message pass, and remember its topic where one is given."""
        if not self._backlog.try_add(decision.cost, qos, decision.client):
            return self._drop()
        if topic is not None and known is not None and topic not in self._fixed:
            self._known[topic] = known
            self._known.move_to_end(topic)
            if len(self._known) > REMEMBERED_TOPICS:
                self._known.popitem(last=False)
        self._decisions.append(decision)
        return Verdict.PASS

    def _drop(self) -> Verdict:
        self.count_dropped()
        return Verdict.DROP
