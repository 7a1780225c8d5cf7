"""Rate limits: token buckets, buckets of clients, and the queue of rejections."""

from __future__ import annotations

from copy import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.mqtt import rejection_queue
from edgelm.mqtt.packets import Packet
from edgelm.mqtt.rate_limit import IDLE_S, NEW_CLIENTS_BURST, ClientRateLimits, TokenBucket
from edgelm.mqtt.rejection_queue import RejectionQueue

steps = st.floats(0, 3)


@given(st.floats(0.1, 50), st.integers(1, 20), st.lists(st.tuples(steps, st.floats(0.1, 30)), max_size=60))
def test_a_bucket_is_limited_by_rate_and_burst(rate, burst, asked):
    bucket, now, taken = TokenBucket(rate, burst), 0.0, 0.0
    for wait, cost in asked:
        now += wait
        until = bucket.wait_s(now, cost)
        took = bucket.try_take(now, cost)
        assert took == (until == 0)
        taken += min(cost, burst) if took else 0
        assert taken <= burst + rate * now + 1e-6
        if not took:
            assert copy(bucket).wait_s(now + until, cost) == pytest.approx(0, abs=1e-6)


@given(st.lists(st.tuples(steps, st.integers(0, 200)), max_size=200))
def test_new_names_do_not_take_an_existing_clients_bucket(others):
    rates, alone, now = ClientRateLimits(2, 3), TokenBucket(2, 3), 0.0
    assert rates.try_take("known", now) == alone.try_take(now)
    for wait, name in others:
        now += wait
        rates.try_take(f"other {name}", now)
        assert rates.try_take("known", now) == alone.try_take(now)
        assert len(rates) <= 64


def test_many_new_names_share_one_bucket():
    rates = ClientRateLimits(10, 20)
    taken = sum(rates.try_take(f"name {i}", 0.0) for i in range(100_000))
    assert taken == 20
    assert sum(rates.try_take(f"name {i}", 1.0) for i in range(100_000)) <= 10 + NEW_CLIENTS_BURST * 20
    assert len(rates) <= NEW_CLIENTS_BURST + 2


def test_an_idle_client_loses_its_bucket_to_another():
    rates = ClientRateLimits(10, 20, max_clients=2)
    assert [rates.try_take(name, 0.0) for name in "abc"] == 3 * [True]
    assert [rates.has_bucket(name) for name in "abc"] == [True, True, False]
    rates.try_take("b", IDLE_S - 1)
    rates.try_take("c", IDLE_S + 1)
    assert [rates.has_bucket(name) for name in "abc"] == [False, True, True]


@given(st.lists(st.tuples(st.floats(0, 0.3), st.sampled_from([None, "a", "b"]), st.integers(1, 60)), max_size=40))
def test_rejections_are_limited_in_number_and_rate_and_keep_their_order(arriving):
    rejections, now, kept, sent = RejectionQueue(), 0.0, {}, {}
    for wait, client, count in arriving:
        now += wait
        for _ in range(count):
            packet = Packet(f"to/{client}", str(len(kept.setdefault(client, []))).encode())
            if rejections.add(client, packet):
                kept[client].append(packet.payload)
        for packet in rejections.take(now, 64):
            sent.setdefault(packet.topic, []).append(packet.payload)
        assert len(rejections) <= rejection_queue.MAX_ALL_WAITING
        for client_sent in sent.values():
            assert len(client_sent) <= rejection_queue.RATE * (1 + now) + 1e-6
    for client, packets in kept.items():
        received = sent.get(f"to/{client}", [])
        assert received == packets[: len(received)]
        assert len(packets) - len(received) <= rejection_queue.MAX_WAITING


def test_a_rejection_is_sent_although_another_client_floods():
    rejections = RejectionQueue()
    assert sum(rejections.add("flood", Packet("flood", b"")) for _ in range(10_000)) == rejection_queue.MAX_WAITING
    for i in range(2000):
        rejections.add(f"name {i}", Packet("name", b""))
    rejections.take(0.0, 64)
    assert rejections.add("other", Packet("other", b""))
    received, now = [], 0.0
    while Packet("other", b"") not in received:
        now += 1.0
        received += rejections.take(now, 64)
        assert now < 10
