"""amqtt with limits: credentials, connections, packet size, and memory for messages.

amqtt by itself reads packets of any length, ends the session of an existing client id before it checks credentials, and
queues messages for slow clients without a limit. Here the CONNECT of each connection is read and checked before it is
passed to amqtt. Only this module imports amqtt; it is imported only if the embedded broker is used.
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

MAX_PACKET_BYTES: Final = 4 * 65_536
"""Maximum packet size without the fixed header of 2 to 5 bytes; the same as the board's own limit."""
MAX_CONNECTIONS: Final = 64
MAX_RETAINED: Final = 1000
MAX_RETAINED_BYTES: Final = 16_000_000
MAX_FILTERS: Final = 2000
"""Different topic filters in the subscriptions of all clients."""
MAX_FILTER_LENGTH: Final = 1024
MAX_IN_DELIVERY: Final = 256
"""Messages being delivered. Beyond it publishing clients must wait."""
CONNECT_TIMEOUT_S: Final = 10.0
WRITE_TIMEOUT_S: Final = 5.0
"""A client that does not read what it is sent for this long is disconnected."""
CHECK_INTERVAL_S: Final = 0.01
WARN_INTERVAL_S: Final = 10.0

_CONNECT: Final = 1
_PUBLISH: Final = 3
_WRONG_VERSION: Final = b"\x20\x02\x00\x01"
_WRONG_CREDENTIALS: Final = b"\x20\x02\x00\x05"


class PacketReader(ReaderAdapter):  # type: ignore[misc]
    """Reads whole packets from a stream. A packet longer than `MAX_PACKET_BYTES` ends the connection unread."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, broker: LimitedBroker) -> None:
        self._reader = reader
        self._writer = writer
        self._broker = broker
        self._packet = b""
        self._at = 0
        self._has_ended = False

    async def read(self, n: int = -1) -> bytes:
        """Return the next n bytes of the packet, or the rest of it for -1.

        Raises `asyncio.IncompleteReadError` if the packet has fewer: a read never continues into the next packet.
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
        """Read the next packet and return it with its header; `read` returns its bytes too."""
        self._packet, self._at = b"", 0
        if self._has_ended:
            raise asyncio.IncompleteReadError(b"", 1)
        head = await self._reader.readexactly(1)
        if head[0] >> 4 == _PUBLISH:
            await self._broker.wait_for_delivery()
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
        if length > MAX_PACKET_BYTES:
            self._broker.warn(f"refused a packet of {length} bytes; the limit is {MAX_PACKET_BYTES}")
            self.feed_eof()
            raise asyncio.IncompleteReadError(head, length)
        self._packet = head + await self._reader.readexactly(length)
        return self._packet

    def replace(self, packet: bytes) -> None:
        """Let `read` return the bytes of this packet instead of those of the packet read last."""
        self._packet, self._at = packet, 0

    def feed_eof(self) -> None:
        """End the connection."""
        self._has_ended = True
        self._writer.transport.abort()


class PacketWriter(StreamWriterAdapter):  # type: ignore[misc]
    """Disconnects a client that does not read what it is sent."""

    async def drain(self) -> None:
        """Wait until there is room in the buffer, for at most `WRITE_TIMEOUT_S`."""
        try:
            await asyncio.wait_for(super().drain(), WRITE_TIMEOUT_S)
        except (asyncio.TimeoutError, TimeoutError):
            self._writer.transport.abort()
            raise ConnectionResetError("the client does not read what it is sent") from None


class LimitedBroker(Broker):  # type: ignore[misc]
    """An amqtt broker with the limits of this module.

    Parameters
    ----------
    config
        Configuration of amqtt.
    username, password
        Credentials that every client must give; None for both accepts every client.
    """

    def __init__(self, config: dict[str, Any], username: str | None, password: str | None) -> None:
        super().__init__(config)
        self._credentials = None if username is None else (username.encode(), (password or "").encode())
        self._connections = 0
        self._warned_at = float("-inf")

    def warn(self, refused: str) -> None:
        """Log a refusal, at most once in `WARN_INTERVAL_S`."""
        now = time.monotonic()
        if now - self._warned_at >= WARN_INTERVAL_S:
            self._warned_at = now
            log.warning("the embedded broker: %s", refused)

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        """Accept a client if there is room, and it sends a CONNECT of MQTT 3.1.1 with the right credentials."""
        if self._connections >= MAX_CONNECTIONS:
            self.warn(f"refused a connection; {self._connections} are open")
            writer.transport.abort()
            return
        self._connections += 1
        try:
            packets = PacketReader(reader, writer, self)
            if await self._check_connect(packets, writer):
                await self._client_connected(listener_name, packets, PacketWriter(writer))
        except (asyncio.IncompleteReadError, asyncio.TimeoutError, TimeoutError, OSError):
            pass  # the client disconnected or sent nothing in time
        finally:
            self._connections -= 1
            writer.close()

    async def _check_connect(self, packets: PacketReader, writer: asyncio.StreamWriter) -> bool:
        packet = await asyncio.wait_for(packets.next_packet(), CONNECT_TIMEOUT_S)
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
            await asyncio.wait_for(writer.drain(), WRITE_TIMEOUT_S)
            return False
        # set the Clean Session flag: the broker stores nothing for disconnected clients
        packets.replace(packet[:flags_at] + bytes([packet[flags_at] | 2]) + packet[flags_at + 1 :])
        return True

    async def wait_for_delivery(self) -> None:
        """Wait while too many messages are being delivered, for at most 2 * `WRITE_TIMEOUT_S`."""
        until = asyncio.get_running_loop().time() + 2 * WRITE_TIMEOUT_S
        while self._in_delivery() >= MAX_IN_DELIVERY and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(CHECK_INTERVAL_S)

    def _in_delivery(self) -> int:
        tasks = self._tasks_queue
        while tasks and tasks[0].done():
            tasks.popleft()
        waiting: int = sum(session.delivered_message_queue.qsize() for session, _ in self._sessions.values())
        return waiting + len(tasks) + int(self._broadcast_queue.qsize())

    async def retain_message(
        self, source_session: Any, topic_name: str | None, data: bytes | bytearray | None, qos: int | None = None
    ) -> None:
        """Retain a message if there is room; otherwise keep the present ones and drop it."""
        if data and topic_name is not None:
            others = [len(kept.data) for topic, kept in self._retained_messages.items() if topic != topic_name]
            if len(others) >= MAX_RETAINED or sum(others) + len(data) > MAX_RETAINED_BYTES:
                self.warn(f"did not retain a message; {len(others)} others are retained")
                return
        await super().retain_message(source_session, topic_name, data, qos)

    async def add_subscription(self, subscription: tuple[str, int], session: Any) -> int:
        """Return the granted QoS, or 128 if the filter is too long or there are too many."""
        name = subscription[0]
        is_new = name not in self._subscriptions
        if len(name) > MAX_FILTER_LENGTH or (is_new and len(self._subscriptions) >= MAX_FILTERS):
            return 0x80
        granted: int = await super().add_subscription(subscription, session)
        return granted


def read_connect(packet: bytes) -> tuple[int, int, bytes, bytes]:
    """Return a CONNECT's protocol level, offset of its flags, user name and password (empty if there is none).

    Raises `ValueError` or `IndexError` if the packet is not a valid CONNECT.
    """
    if packet[0] >> 4 != _CONNECT:
        raise ValueError("the first packet is not a CONNECT")
    at = next(i for i in range(1, len(packet)) if not packet[i] & 0x80) + 1

    def text() -> bytes:
        nonlocal at
        start = at + 2
        at = start + int.from_bytes(packet[at:start], "big")
        if at > len(packet) or start > len(packet):
            raise ValueError("the CONNECT is truncated")
        return packet[start:at]

    if text() != b"MQTT":
        raise ValueError("not MQTT")
    level, flags_at = packet[at], at + 1
    flags = packet[flags_at]
    if level != 4:
        return level, flags_at, b"", b""
    at += 4
    text()  # client id
    if flags & 0x04:
        text(), text()  # topic and payload of the last will
    user = text() if flags & 0x80 else b""
    password = text() if flags & 0x40 else b""
    return level, flags_at, user, password
