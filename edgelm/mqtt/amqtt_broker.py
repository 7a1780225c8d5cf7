"""amqtt with limits: who may connect, how long a packet may be, and how much is held for clients.

amqtt by itself reads packets of any length, lets a client take over another's name before it asks for credentials, and
holds what clients are slow to take without limit. Here each connection passes a door first: its CONNECT is read and
checked before amqtt hears of it. The only importer of amqtt, and imported only where the embedded broker is wanted.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import Any, Final

from amqtt.adapters import ReaderAdapter, StreamWriterAdapter
from amqtt.broker import Broker

log = logging.getLogger(__name__)

PACKET_BYTES: Final = 4 * 65_536
"""Longest packet, without its header of 2 to 5 bytes: what the board itself asks of a broker."""
MOST_CONNECTIONS: Final = 64
MOST_RETAINED: Final = 1000
MOST_RETAINED_BYTES: Final = 16_000_000
MOST_FILTERS: Final = 2000
"""Different topic filters that all clients together subscribe to."""
MOST_FILTER_LENGTH: Final = 1024
MOST_UNDER_WAY: Final = 256
"""Messages that are being handed out; who publishes more waits until these have been taken."""
CONNECT_WITHIN_S: Final = 10.0
TAKE_WITHIN_S: Final = 5.0
"""How long a client may let what it is sent lie; then it is disconnected."""
CHECK_EVERY_S: Final = 0.01
WARN_EVERY_S: Final = 10.0

_CONNECT: Final = 1
_PUBLISH: Final = 3
_WRONG_VERSION: Final = b"\x20\x02\x00\x01"
_WRONG_CREDENTIALS: Final = b"\x20\x02\x00\x05"


class PacketReader(ReaderAdapter):  # type: ignore[misc]
    """Reads a stream by whole packets, none longer than `PACKET_BYTES`. What is longer ends the connection unread."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, broker: LimitedBroker) -> None:
        self._reader = reader
        self._writer = writer
        self._broker = broker
        self._packet = b""
        self._at = 0
        self._has_ended = False

    async def read(self, n: int = -1) -> bytes:
        """Return the next n bytes of the packet, all of the rest for -1.

        Raises `asyncio.IncompleteReadError` where it has fewer: nobody reads on into the next packet.
        """
        if self._at == len(self._packet):
            await self.next_packet()
        end = len(self._packet) if n < 0 else self._at + n
        if end > len(self._packet) or self._has_ended:
            self.feed_eof()
            raise asyncio.IncompleteReadError(self._packet[self._at :], n)
        start, self._at = self._at, end
        return self._packet[start:end]

    async def next_packet(self) -> bytes:
        """Read the next packet, header included, and return it; `read` hands it out too."""
        self._packet, self._at = b"", 0
        if self._has_ended:
            raise asyncio.IncompleteReadError(b"", 1)
        head = await self._reader.readexactly(1)
        if head[0] >> 4 == _PUBLISH:
            await self._broker.wait_for_room()
        length, shift = 0, 0
        while True:
            byte = await self._reader.readexactly(1)
            head += byte
            length |= (byte[0] & 0x7F) << shift
            shift += 7
            if not byte[0] & 0x80:
                break
            if shift > 21:
                self.feed_eof()
                raise asyncio.IncompleteReadError(head, 1)
        if length > PACKET_BYTES:
            self._broker.warn(f"a packet of {length} bytes was refused, the limit is {PACKET_BYTES}")
            self.feed_eof()
            raise asyncio.IncompleteReadError(head, length)
        self._packet = head + await self._reader.readexactly(length)
        return self._packet

    def replace(self, packet: bytes) -> None:
        """Have `read` hand out this packet instead of the one that was read last."""
        self._packet, self._at = packet, 0

    def feed_eof(self) -> None:
        """End the connection."""
        self._has_ended = True
        self._writer.transport.abort()


class PacketWriter(StreamWriterAdapter):  # type: ignore[misc]
    """Disconnects a client that does not take what it is sent."""

    async def drain(self) -> None:
        """Wait until there is room, for `TAKE_WITHIN_S` at most."""
        try:
            await asyncio.wait_for(super().drain(), TAKE_WITHIN_S)
        except (asyncio.TimeoutError, TimeoutError):
            self._writer.transport.abort()
            raise ConnectionResetError("the client does not take what it is sent") from None


class LimitedBroker(Broker):  # type: ignore[misc]
    """amqtt behind a door.

    Parameters
    ----------
    config
        amqtt's.
    username, password
        What every client must give; None for both lets everyone in.
    """

    def __init__(self, config: dict[str, Any], username: str | None, password: str | None) -> None:
        super().__init__(config)
        self._credentials = None if username is None else (username.encode(), (password or "").encode())
        self._connections = 0
        self._warned_at = float("-inf")

    def warn(self, refused: str) -> None:
        """Log what was refused, but not all that a client may have refused in a row."""
        now = time.monotonic()
        if now - self._warned_at >= WARN_EVERY_S:
            self._warned_at = now
            log.warning("the embedded broker: %s", refused)

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        """Let a client in that has a place, a CONNECT of MQTT 3.1.1 and the right credentials."""
        if self._connections >= MOST_CONNECTIONS:
            self.warn(f"a connection was refused, {self._connections} are open")
            writer.transport.abort()
            return
        self._connections += 1
        try:
            packets = PacketReader(reader, writer, self)
            if await self._authenticate(packets, writer):
                await self._client_connected(listener_name, packets, PacketWriter(writer))
        except (asyncio.IncompleteReadError, asyncio.TimeoutError, TimeoutError, OSError):
            pass  # it left, or said nothing
        finally:
            self._connections -= 1
            writer.close()

    async def _authenticate(self, packets: PacketReader, writer: asyncio.StreamWriter) -> bool:
        packet = await asyncio.wait_for(packets.next_packet(), CONNECT_WITHIN_S)
        try:
            level, flags_at, user, password = read_connect(packet)
        except (ValueError, IndexError):
            writer.transport.abort()
            return False
        refusal = None
        if level != 4:
            refusal = _WRONG_VERSION
        elif self._credentials is not None:
            right = [hmac.compare_digest(*pair) for pair in zip((user, password), self._credentials, strict=True)]
            refusal = None if all(right) else _WRONG_CREDENTIALS
        if refusal is not None:
            writer.write(refusal)
            await asyncio.wait_for(writer.drain(), TAKE_WITHIN_S)
            return False
        # nothing is kept for a client that is away: every session is a clean one
        packets.replace(packet[:flags_at] + bytes([packet[flags_at] | 2]) + packet[flags_at + 1 :])
        return True

    async def wait_for_room(self) -> None:
        """Wait while too much is being handed out; no longer than a slow client may take, then there is room again."""
        until = asyncio.get_running_loop().time() + 2 * TAKE_WITHIN_S
        while self._under_way() >= MOST_UNDER_WAY and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(CHECK_EVERY_S)

    def _under_way(self) -> int:
        tasks = self._tasks_queue
        while tasks and tasks[0].done():
            tasks.popleft()
        waiting: int = sum(session.delivered_message_queue.qsize() for session, _ in self._sessions.values())
        return waiting + len(tasks) + int(self._broadcast_queue.qsize())

    async def retain_message(
        self, source_session: Any, topic_name: str | None, data: bytes | bytearray | None, qos: int | None = None
    ) -> None:
        """Retain a message where there is room; where there is none, those there are stay."""
        if data and topic_name is not None:
            others = [len(kept.data) for topic, kept in self._retained_messages.items() if topic != topic_name]
            if len(others) >= MOST_RETAINED or sum(others) + len(data) > MOST_RETAINED_BYTES:
                self.warn(f"a message was not retained, {len(others)} are")
                return
        await super().retain_message(source_session, topic_name, data, qos)

    async def add_subscription(self, subscription: tuple[str, int], session: Any) -> int:
        """Return the granted QoS, or 128 where the filter is too long or one too many."""
        name = subscription[0]
        is_new = name not in self._subscriptions
        if len(name) > MOST_FILTER_LENGTH or (is_new and len(self._subscriptions) >= MOST_FILTERS):
            return 0x80
        granted: int = await super().add_subscription(subscription, session)
        return granted


def read_connect(packet: bytes) -> tuple[int, int, bytes, bytes]:
    """Return a CONNECT's protocol level, where its flags stand, user name and password; empty where there is none.

    Raises `ValueError` or `IndexError` for what is no CONNECT.
    """
    if packet[0] >> 4 != _CONNECT:
        raise ValueError("the first packet is no CONNECT")
    at = next(i for i in range(1, len(packet)) if not packet[i] & 0x80) + 1

    def text() -> bytes:
        nonlocal at
        start = at + 2
        at = start + int.from_bytes(packet[at:start], "big")
        if at > len(packet) or start > len(packet):
            raise ValueError("the CONNECT is cut off")
        return packet[start:at]

    if text() != b"MQTT":
        raise ValueError("not MQTT")
    level, flags_at = packet[at], at + 1
    flags = packet[flags_at]
    if level != 4:
        return level, flags_at, b"", b""
    at += 4
    text()  # the client's id
    if flags & 0x04:
        text(), text()  # the last will
    user = text() if flags & 0x80 else b""
    password = text() if flags & 0x40 else b""
    return level, flags_at, user, password
