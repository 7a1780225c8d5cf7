"""How often: no more than a bucket holds and gains, whoever else comes; and refusals no more than that."""

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
def test_a_bucket_gives_no_more_than_it_holds_and_gains(rate, burst, asked):
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
def test_who_was_there_before_keeps_its_bucket_whatever_names_come(others):
    rates, alone, now = ClientRateLimits(2, 3), TokenBucket(2, 3), 0.0
    assert rates.try_take("known", now) == alone.try_take(now)
    for wait, name in others:
        now += wait
        rates.try_take(f"other {name}", now)
        assert rates.try_take("known", now) == alone.try_take(now)
        assert len(rates) <= 64


def test_names_that_never_end_have_one_bucket_together():
    rates = ClientRateLimits(10, 20)
    taken = sum(rates.try_take(f"name {i}", 0.0) for i in range(100_000))
    assert taken == 20
    assert sum(rates.try_take(f"name {i}", 1.0) for i in range(100_000)) <= 10 + NEW_CLIENTS_BURST * 20
    assert len(rates) <= NEW_CLIENTS_BURST + 2


def test_a_client_that_was_not_seen_for_long_gives_its_bucket_to_another():
    rates = ClientRateLimits(10, 20, max_clients=2)
    assert [rates.try_take(name, 0.0) for name in "abc"] == 3 * [True]
    assert [rates.has_bucket(name) for name in "abc"] == [True, True, False]
    rates.try_take("b", IDLE_S - 1)
    rates.try_take("c", IDLE_S + 1)
    assert [rates.has_bucket(name) for name in "abc"] == [False, True, True]


@given(st.lists(st.tuples(st.floats(0, 0.3), st.sampled_from([None, "a", "b"]), st.integers(1, 60)), max_size=40))
def test_refusals_are_bounded_in_number_and_rate_and_keep_their_order(arriving):
    waiting, now, kept, sent = RejectionQueue(), 0.0, {}, {}
    for wait, client, count in arriving:
        now += wait
        for _ in range(count):
            packet = Packet(f"to/{client}", str(len(kept.setdefault(client, []))).encode())
            if waiting.add(client, packet):
                kept[client].append(packet.payload)
        for packet in waiting.take(now, 64):
            sent.setdefault(packet.topic, []).append(packet.payload)
        assert len(waiting) <= rejection_queue.MAX_ALL_WAITING
        for client_sent in sent.values():
            assert len(client_sent) <= rejection_queue.RATE * (1 + now) + 1e-6
    for client, packets in kept.items():
        told = sent.get(f"to/{client}", [])
        assert told == packets[: len(told)]
        assert len(packets) - len(told) <= rejection_queue.MAX_WAITING


def test_a_client_hears_of_its_refusal_though_another_floods():
    waiting = RejectionQueue()
    assert sum(waiting.add("flood", Packet("flood", b"")) for _ in range(10_000)) == rejection_queue.MAX_WAITING
    for i in range(2000):
        waiting.add(f"name {i}", Packet("name", b""))
    waiting.take(0.0, 64)
    assert waiting.add("other", Packet("other", b""))
    told, now = [], 0.0
    while Packet("other", b"") not in told:
        now += 1.0
        told += waiting.take(now, 64)
        assert now < 10
