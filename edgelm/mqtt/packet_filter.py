"""Drops PUBLISH packets between the socket and paho (packet format: MQTT 3.1.1 and 5.0, sections 2.1 and 3.3).

paho needs about 50 microseconds for the smallest message and 20 milliseconds for one with 195 KB of user properties,
while a broker can send 100,000 messages a second. Here a dropped message costs one microsecond. Properties that the
protocol does not use are removed from the messages that pass. Knows the packet format, not clients or topics.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

READ_BYTES: Final = 256 * 1024
"""Bytes read from the socket at a time."""
HEAD_BYTES: Final = 4096
"""Bytes read at a time after a large message was dropped."""
LARGE_BYTES: Final = 16 * 1024
"""If at least this many bytes of a message must be dropped, they are discarded without copying them."""


class Verdict(Enum):
    """What to do with a message."""

    PASS = 1
    DROP = 2
    """Drop it. A message of QoS 1 is acknowledged; otherwise the broker would keep it and stop sending others."""


PacketPolicy = Callable[[bytes, int, int], Verdict]
"""Called once for each message, in order, with its topic, its QoS and the size of its packet in bytes."""

IDENTICAL_AT_ONCE: Final = 64
MAX_IDENTICAL_BYTES: Final = 512
"""Identical dropped messages of up to this size are compared this many at a time."""

_PUBLISH: Final = 0x30
_USED_PROPERTIES: Final = frozenset({0x01, 0x02, 0x08, 0x09})
"""Payload format, message expiry, response topic, correlation data."""
_FIXED_SIZES: Final = {0x01: 1, 0x02: 4, 0x23: 2}
_LENGTH_PREFIXED: Final = {0x03: 1, 0x08: 1, 0x09: 1, 0x26: 2}
"""Number of length-prefixed strings in a property."""


class PacketFilter:
    """Removes dropped messages from a byte stream of MQTT packets.

    Parameters
    ----------
    decide
        Returns the verdict about a message. If one is dropped, messages with the same topic, QoS and size that follow
        it in the same read are dropped too, without a call.
    is_mqtt5
        Whether messages have properties.
    count_dropped
        Receives the number of messages dropped without a call of `decide`.
    acknowledge
        Receives the packet identifiers of dropped messages of QoS 1, in order.
    """

    def __init__(
        self,
        decide: PacketPolicy,
        *,
        is_mqtt5: bool,
        count_dropped: Callable[[int], None] = lambda _: None,
        acknowledge: Callable[[list[int]], None] = lambda _: None,
    ) -> None:
        self._decide = decide
        self._count_dropped = count_dropped
        self._acknowledge = acknowledge
        self._is_mqtt5 = is_mqtt5
        self._incomplete = b""
        """The received beginning of an incomplete packet."""
        self._verdict: Verdict | None = None
        """Verdict about the incomplete packet."""
        self._bytes_to_drop = 0
        """Bytes of a dropped message that were not received yet."""
        self._bytes_to_pass = 0
        """Bytes of a packet that passes unchanged that were not received yet."""
        self._is_broken = False
        """Whether the stream is malformed and passes unchanged."""

    @property
    def bytes_to_drop(self) -> int:
        """Number of the next bytes that belong to a dropped message."""
        return self._bytes_to_drop

    def mark_dropped(self, count: int) -> None:
        """Record that the next `count` bytes, at most `bytes_to_drop`, were discarded by the caller."""
        self._bytes_to_drop -= count

    def feed(self, data: bytes) -> bytes:  # noqa: C901  one loop over shared state, 100,000 times a second
        """Return the part of `data` that passes. A malformed stream passes unchanged: paho ends the connection."""
        if self._is_broken:
            return data
        passed: list[bytes] = []
        dropped: list[int] = []
        at = 0
        if self._bytes_to_drop:
            at = min(self._bytes_to_drop, len(data))
            self._bytes_to_drop -= at
        elif self._bytes_to_pass:
            at = min(self._bytes_to_pass, len(data))
            self._bytes_to_pass -= at
            passed.append(data[:at])
        if self._incomplete:
            data, self._incomplete = self._incomplete + data, b""  # in this state both counts above are 0
        size = len(data)
        while size - at >= 2:
            if data[at + 1] < 0x80:
                end = at + 2 + data[at + 1]
                body = at + 2
            else:
                try:
                    length, body = _read_varint(data, at + 1)
                except IndexError:
                    if size - at < 5:
                        break  # the length is incomplete
                    return self._give_up(passed, data[at:])
                end = body + length
            if data[at] & 0xF0 != _PUBLISH:
                passed.append(data[at:end])
                self._bytes_to_pass = max(0, end - size)
                at = min(end, size)
                continue
            if size < body + 2:
                break
            topic_end = body + 2 + (data[body] << 8 | data[body + 1])
            begin = topic_end + (2 if data[at] & 6 else 0)
            if begin > end:
                return self._give_up(passed, data[at:])
            if size < begin:
                break
            if self._verdict is None:
                self._verdict = self._decide(data[body + 2 : topic_end], (data[at] >> 1) & 3, end - at)
            verdict = self._verdict
            if verdict is Verdict.PASS:
                if size < end:
                    break
                passed.append(self._without_unused_properties(data[at:end], body - at, begin - at))
            elif begin > topic_end:
                dropped.append(data[topic_end] << 8 | data[topic_end + 1])
            self._verdict = None
            self._bytes_to_drop = max(0, end - size)
            start_at, at = at, min(end, size)
            if verdict is Verdict.DROP and end <= size:
                at = self._drop_identical(data, start_at, topic_end, end, dropped if begin > topic_end else None)
        self._incomplete = data[at:]
        if dropped:
            self._acknowledge(dropped)
        return b"".join(passed)

    def _drop_identical(self, data: bytes, start_at: int, topic_end: int, end: int, dropped: list[int] | None) -> int:
        """Drop the messages from `end` on that have the topic, QoS and size of the dropped one in data[start_at:end].

        Returns the offset behind them. One read may contain thousands of such messages. Identifiers of QoS 1 are
        appended to `dropped`, which is None for QoS 0.
        """
        step = end - start_at
        if step <= MAX_IDENTICAL_BYTES and dropped is None:
            block, block_bytes = data[start_at:end] * IDENTICAL_AT_ONCE, step * IDENTICAL_AT_ONCE
            while data.startswith(block, end):
                end += block_bytes
        start, size = data[start_at:topic_end], len(data)
        id_offset = topic_end - start_at
        while end + step <= size and data.startswith(start, end):
            if dropped is not None:
                dropped.append(data[end + id_offset] << 8 | data[end + id_offset + 1])
            end += step
        count = (end - start_at) // step - 1
        if count:
            self._count_dropped(count)
        return end

    def _give_up(self, passed: list[bytes], rest: bytes) -> bytes:
        """Pass everything from now on."""
        self._is_broken = True
        return b"".join([*passed, rest])

    def _without_unused_properties(self, packet: bytes, body: int, begin: int) -> bytes:
        """Return a PUBLISH packet without unused properties. They start at offset `begin`, the topic at `body`."""
        if not self._is_mqtt5:
            return packet
        try:
            length, at = _read_varint(packet, begin)
            end = at + length
            kept = b"".join(_read_used_properties(packet, at, end))
        except (IndexError, KeyError):  # malformed: paho ends the connection
            return packet
        if len(kept) == length:
            return packet
        return _write_packet(packet[:1], packet[body:begin] + _write_varint(len(kept)) + kept + packet[end:])


def _read_used_properties(packet: bytes, at: int, end: int) -> list[bytes]:
    """Return the used properties in packet[at:end]. Raises `IndexError` or `KeyError` if they are malformed."""
    kept = []
    while at < end:
        kind, begin = packet[at], at
        at += 1
        if kind in _FIXED_SIZES:
            at += _FIXED_SIZES[kind]
        elif kind == 0x0B:  # subscription identifier
            at = _read_varint(packet, at)[1]
        else:
            for _ in range(_LENGTH_PREFIXED[kind]):
                at += 2 + (packet[at] << 8 | packet[at + 1])
        if kind in _USED_PROPERTIES:
            kept.append(packet[begin:at])
    if at != end:
        raise IndexError("a property is longer than the properties")
    return kept


def _read_varint(packet: bytes, at: int) -> tuple[int, int]:
    """Return a variable byte integer and the offset behind it (MQTT 5.0, section 1.5.5)."""
    value = shift = 0
    while True:
        byte = packet[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 21:
            raise IndexError("a variable byte integer of more than four bytes")


def _write_varint(value: int) -> bytes:
    """Return the bytes of a variable byte integer."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _write_packet(first: bytes, rest: bytes) -> bytes:
    return first + _write_varint(len(rest)) + rest


class FilteredSocket:
    """Replaces a socket for paho: `recv` returns filtered bytes, everything else is delegated to the socket."""

    def __init__(self, sock: Any, packet_filter: PacketFilter) -> None:
        self._sock = sock
        self._filter = packet_filter
        self._ready = b""
        self._at = 0
        self._discarded: bytearray | None = None
        """Buffer for the rest of a large dropped message, which Linux discards without copying (MSG_TRUNC, tcp(7))."""
        if sys.platform == "linux" and type(sock) is socket.socket and sock.family != socket.AF_UNIX:
            self._discarded = bytearray(READ_BYTES)
        self._dropped_large = False
        """Whether a large message was dropped last. The next is likely large too, so only its beginning is read."""

    def recv(self, size: int) -> bytes:
        """Return up to `size` bytes that passed. Raises `BlockingIOError` if there are none yet."""
        if self._at >= len(self._ready):
            to_drop = self._filter.bytes_to_drop
            if self._discarded is not None and to_drop >= LARGE_BYTES:
                count = self._sock.recv_into(self._discarded, min(to_drop, READ_BYTES), socket.MSG_TRUNC)
                if not count:
                    return b""
                self._filter.mark_dropped(count)
                self._dropped_large = True
                raise BlockingIOError
            data = self._sock.recv(HEAD_BYTES if self._dropped_large else READ_BYTES)
            self._dropped_large = False
            if not data:
                return b""
            self._ready, self._at = self._filter.feed(data), 0
            if not self._ready:
                raise BlockingIOError
        piece = self._ready[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def pending(self) -> int:
        """Return the number of bytes that can be read without waiting for the socket."""
        inner = self._sock.pending() if hasattr(self._sock, "pending") else 0
        return len(self._ready) - self._at + int(inner)

    def fileno(self) -> int:
        """Return the file descriptor of the socket."""
        return int(self._sock.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
