"""The packet filter gives the same bytes as a reference on whole packets, for any split of the stream into reads."""

from __future__ import annotations

import socket
import struct
import threading

from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgelm.mqtt.packet_filter import FilteredSocket, PacketFilter, Verdict

MID = 7
USED = {"ResponseTopic", "CorrelationData", "MessageExpiryInterval", "PayloadFormatIndicator"}


def varint(value):
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def properties_of(given_properties, *, only=None):
    packed = Properties(PacketTypes.PUBLISH)
    for name, value in given_properties.items():
        if only is None or name in only:
            setattr(packed, name, value)
    return packed.pack()


def publish(topic, qos, payload, properties):
    body = struct.pack(">H", len(topic)) + topic + (b"\0\7" if qos else b"") + properties + payload
    return bytes([0x30 | qos << 1]) + varint(len(body)) + body


texts = st.text("abc/é", max_size=9)
properties = st.fixed_dictionaries(
    {},
    optional={
        "ResponseTopic": texts,
        "CorrelationData": st.binary(max_size=300),
        "MessageExpiryInterval": st.integers(0, 2**32 - 1),
        "PayloadFormatIndicator": st.integers(0, 1),
        "ContentType": texts,
        "TopicAlias": st.integers(1, 9),
        "SubscriptionIdentifier": st.lists(st.integers(1, 2**28 - 1), min_size=1, max_size=3),
        "UserProperty": st.lists(st.tuples(texts, st.text(max_size=200)), min_size=1, max_size=4).map(
            lambda pairs: [(key, value.replace("\0", "").replace("\ufeff", "")) for key, value in pairs]
        ),
    },
)
messages = st.tuples(
    st.sampled_from([b"a", b"a/b", "é".encode()]), st.integers(0, 1), st.binary(max_size=300), properties
)
others = st.sampled_from([b"\xd0\x00", b"\x40\x02\x00\x07", b"\x90\x04\x00\x01\x00\x01"])
streams = st.lists(st.tuples(messages, st.sampled_from(Verdict), st.integers(1, 70)) | others, max_size=12)


@given(stream=streams, cuts=st.lists(st.integers(1, 50), max_size=200), is_mqtt5=st.booleans())
def test_the_filter_equals_a_reference_on_whole_packets(stream, cuts, is_mqtt5):
    data, expected, verdicts, dropped, acknowledged = b"", b"", {}, 0, []
    for each in stream:
        if isinstance(each, bytes):
            data += each
            expected += each
            continue
        (topic, qos, payload, given_properties), verdict, count = each
        topic += b"/" + str(len(verdicts)).encode()
        verdicts[topic] = verdict
        whole = publish(topic, qos, payload, properties_of(given_properties) if is_mqtt5 else b"")
        kept = publish(topic, qos, payload, properties_of(given_properties, only=USED) if is_mqtt5 else b"")
        data += whole * count
        if verdict is Verdict.PASS:
            expected += kept * count
        else:
            dropped += count
            acknowledged += [MID] * count * qos
    decided, counted, identifiers = [], [], []
    packet_filter = PacketFilter(
        lambda topic, qos, size: decided.append(topic) or verdicts[topic],
        is_mqtt5=is_mqtt5,
        count_dropped=counted.append,
        acknowledge=identifiers.extend,
    )
    passed, at = b"", 0
    for size in [*cuts, len(data)]:
        passed += packet_filter.feed(data[at : at + size])
        at += size
    assert passed == expected
    assert sum(verdicts[topic] is Verdict.DROP for topic in decided) + sum(counted) == dropped
    assert identifiers == acknowledged


@given(st.binary(max_size=200), st.lists(st.integers(1, 9), max_size=50))
def test_malformed_bytes_never_raise(data, cuts):
    packet_filter = PacketFilter(lambda topic, qos, size: Verdict.PASS, is_mqtt5=True)
    passed, at = b"", 0
    for size in [*cuts, len(data)]:
        passed += packet_filter.feed(data[at : at + size])
        at += size
    assert len(passed) <= len(data)


def test_user_properties_are_removed():
    given_properties = {"UserProperty": 3 * [("k", "v" * 65_000)], "CorrelationData": b"mine"}
    whole = publish(b"a", 1, b"hello", properties_of(given_properties))
    assert len(whole) > 195_000
    assert PacketFilter(lambda *_: Verdict.PASS, is_mqtt5=True).feed(whole) == publish(
        b"a", 1, b"hello", properties_of({"CorrelationData": b"mine"})
    )


class Pipe:
    """A socket that returns the given reads."""

    def __init__(self, *reads):
        self.reads = list(reads)

    def recv(self, _size):
        return self.reads.pop(0)


def test_recv_returns_at_most_the_requested_bytes():
    whole = publish(b"a", 0, b"hello", b"\0")
    sock = FilteredSocket(
        Pipe(whole[:3], whole[3:] + b"\xd0\x00", b""), PacketFilter(lambda *_: Verdict.PASS, is_mqtt5=True)
    )
    got = b""
    while True:
        try:
            piece = sock.recv(2)
        except BlockingIOError:
            continue
        if not piece:
            break
        assert len(piece) <= 2
        got += piece
    assert got == whole + b"\xd0\x00"
    assert sock.pending() == 0


def test_large_messages_are_dropped_and_the_next_one_passes():
    ours, theirs = (
        socket.create_connection(listener.getsockname()) if made else listener
        for listener in [socket.create_server(("127.0.0.1", 0))]
        for made in (True, False)
    )
    broker = theirs.accept()[0]
    large, small = publish(b"drop", 0, b"x" * 250_000, b"\0"), publish(b"keep", 0, b"hello", b"\0")
    sender = threading.Thread(target=lambda: broker.sendall(8 * (large + large + small)))
    sender.start()
    ours.settimeout(10)
    sock = FilteredSocket(
        ours, PacketFilter(lambda topic, *_: Verdict.DROP if topic == b"drop" else Verdict.PASS, is_mqtt5=True)
    )
    got = b""
    while len(got) < 8 * len(small):
        try:
            got += sock.recv(100)
        except BlockingIOError:
            continue
    sender.join()
    for each in (ours, theirs, broker):
        each.close()
    assert got == 8 * small
