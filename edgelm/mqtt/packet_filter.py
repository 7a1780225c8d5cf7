"""Drops messages between the socket and paho, as MQTT frames them (MQTT 3.1.1 and 5.0, sections 2.1 and 3.3).

paho takes some 50 microseconds for the smallest message, and 20 milliseconds for one with 195 KB of user properties; a
broker hands out a hundred thousand a second. What is to be dropped is dropped here, where it costs a microsecond. Of
what passes, properties that the protocol does not use are taken out. Knows frames, not who sends what.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

READ_BYTES: Final = 256 * 1024
"""What is read from the socket at a time."""
HEAD_BYTES: Final = 4096
LARGE_BYTES: Final = 16 * 1024
"""Rests of messages that are dropped without being read."""


class Verdict(Enum):
    """What becomes of a message."""

    PASS = 1
    DROP = 2
    """It is dropped; one of QoS 1 is acknowledged, or the broker would keep it and send no other."""


PacketPolicy = Callable[[bytes, int, int], Verdict]
"""Given a message's topic, its QoS, and the bytes of its packet; called once for each message, in their order."""

ALIKE_AT_ONCE: Final = 64
MOST_ALIKE_BYTES: Final = 512
"""Messages that are the same to the last byte are looked for so many at a time, up to this size."""

_PUBLISH: Final = 0x30
_KEPT: Final = frozenset({0x01, 0x02, 0x08, 0x09})
"""Payload format, expiry, response topic, correlation data."""
_FIXED: Final = {0x01: 1, 0x02: 4, 0x23: 2}
_TEXTS: Final = {0x03: 1, 0x08: 1, 0x09: 1, 0x26: 2}
"""How many texts or data with a length before them a property has."""


class PacketFilter:
    """A stream of packets from a broker, with some messages left out.

    Parameters
    ----------
    judge
        Decides of each message; what it says of one of QoS 0 that is dropped holds for those alike in the same read.
    is_5
        Whether messages have properties.
    count_skipped
        Told how many were dropped so.
    acknowledge
        Given the identifiers of dropped messages of QoS 1, in their order.
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
        self._count_skipped = count_dropped
        self._acknowledge = acknowledge
        self._is_5 = is_mqtt5
        self._held = b""
        """The beginning of a packet whose end has not come."""
        self._verdict: Verdict | None = None
        """Of the message that is held."""
        self._bytes_to_drop = 0
        """Bytes of a message to be dropped that have not come."""
        self._bytes_to_pass = 0
        """The same of a packet that passes as it is."""
        self._is_broken = False

    @property
    def bytes_to_drop(self) -> int:
        """How many of the next bytes will be dropped whatever they are."""
        return self._bytes_to_drop

    def skip(self, count: int) -> None:
        """Note that so many of them, at most `bytes_to_drop`, were dropped elsewhere."""
        self._bytes_to_drop -= count

    def feed(self, data: bytes) -> bytes:  # noqa: C901  the state of one loop, run a hundred thousand times a second
        """Return what passes of the next bytes. What cannot be a packet passes, for paho to end the connection."""
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
        if self._held:
            data, self._held = self._held + data, b""  # then nothing was to be skipped or passed
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
                        break  # the length has not come whole
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
                passed.append(self._packet(data[at:end], body - at, begin - at))
            elif begin > topic_end:
                dropped.append(data[topic_end] << 8 | data[topic_end + 1])
            self._verdict = None
            self._bytes_to_drop = max(0, end - size)
            begun, at = at, min(end, size)
            if verdict is Verdict.DROP and end <= size:
                at = self._skip_alike(data, begun, topic_end, end, dropped if begin > topic_end else None)
        self._held = data[at:]
        if dropped:
            self._acknowledge(dropped)
        return b"".join(passed)

    def _skip_alike(self, data: bytes, begun: int, topic_end: int, end: int, dropped: list[int] | None) -> int:
        """Return the place behind the messages in [end, ...) of the topic, QoS and size of the one in [begun, end).

        It was dropped, and so are they: a client that floods sends thousands of them in one read. The identifiers of
        those of QoS 1 are added to `dropped`, which is None for QoS 0.
        """
        step = end - begun
        if step <= MOST_ALIKE_BYTES and dropped is None:
            block, wide = data[begun:end] * ALIKE_AT_ONCE, step * ALIKE_AT_ONCE
            while data.startswith(block, end):
                end += wide
        start, size = data[begun:topic_end], len(data)
        behind = topic_end - begun
        while end + step <= size and data.startswith(start, end):
            if dropped is not None:
                dropped.append(data[end + behind] << 8 | data[end + behind + 1])
            end += step
        count = (end - begun) // step - 1
        if count:
            self._count_skipped(count)
        return end

    def _give_up(self, passed: list[bytes], rest: bytes) -> bytes:
        """Let all pass from now on."""
        self._is_broken = True
        return b"".join([*passed, rest])

    def _packet(self, packet: bytes, body: int, begin: int) -> bytes:
        """Return a PUBLISH packet without properties that are not used: they begin at `begin`, its topic at `body`."""
        if not self._is_5:
            return packet
        try:
            length, at = _read_varint(packet, begin)
            end = at + length
            kept = b"".join(_kept_properties(packet, at, end))
        except (IndexError, KeyError):  # malformed: paho ends the connection
            return packet
        if len(kept) == length:
            return packet
        return _framed(packet[:1], packet[body:begin] + _write_varint(len(kept)) + kept + packet[end:])


def _kept_properties(packet: bytes, at: int, end: int) -> list[bytes]:
    """Return the properties in [at, end) that are used. Raises `IndexError` or `KeyError` where they are malformed."""
    kept = []
    while at < end:
        kind, begin = packet[at], at
        at += 1
        if kind in _FIXED:
            at += _FIXED[kind]
        elif kind == 0x0B:  # a subscription's number
            at = _read_varint(packet, at)[1]
        else:
            for _ in range(_TEXTS[kind]):
                at += 2 + (packet[at] << 8 | packet[at + 1])
        if kind in _KEPT:
            kept.append(packet[begin:at])
    if at != end:
        raise IndexError("a property exceeds the properties")
    return kept


def _read_varint(packet: bytes, at: int) -> tuple[int, int]:
    """Return a variable byte integer and the place behind it."""
    value = shift = 0
    while True:
        byte = packet[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 21:
            raise IndexError("a number of more than four bytes")


def _write_varint(value: int) -> bytes:
    """Return a variable byte integer's bytes."""
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _framed(first: bytes, rest: bytes) -> bytes:
    return first + _write_varint(len(rest)) + rest


class FilteredSocket:
    """A socket, in the eyes of paho, from which a sieve's messages come. All else goes to the real one."""

    def __init__(self, sock: Any, packet_filter: PacketFilter) -> None:
        self._sock = sock
        self._sieve = packet_filter
        self._ready = b""
        self._at = 0
        self._waste: bytearray | None = None
        """Where the rest of a large message goes that is dropped, which Linux then does not even copy (tcp(7))."""
        if sys.platform == "linux" and type(sock) is socket.socket and sock.family != socket.AF_UNIX:
            self._waste = bytearray(READ_BYTES)
        self._was_large = False
        """Whether such a one was dropped last: the next is likely one too, and only its beginning is read."""

    def recv(self, size: int) -> bytes:
        """Return up to `size` bytes that passed. Raises `BlockingIOError` where there are none yet."""
        if self._at >= len(self._ready):
            skip = self._sieve.bytes_to_drop
            if self._waste is not None and skip >= LARGE_BYTES:
                count = self._sock.recv_into(self._waste, min(skip, READ_BYTES), socket.MSG_TRUNC)
                if not count:
                    return b""
                self._sieve.skip(count)
                self._was_large = True
                raise BlockingIOError
            data = self._sock.recv(HEAD_BYTES if self._was_large else READ_BYTES)
            self._was_large = False
            if not data:
                return b""
            self._ready, self._at = self._sieve.feed(data), 0
            if not self._ready:
                raise BlockingIOError
        piece = self._ready[self._at : self._at + size]
        self._at += len(piece)
        return piece

    def pending(self) -> int:
        """Return how many bytes can be had without waiting for the socket."""
        inner = self._sock.pending() if hasattr(self._sock, "pending") else 0
        return len(self._ready) - self._at + int(inner)

    def fileno(self) -> int:
        """Return the real socket's."""
        return int(self._sock.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)
