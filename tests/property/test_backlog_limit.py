"""A message of QoS 0 never makes the backlog exceed the limit in all or of one client."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgelm.mqtt.backlog_limit import BacklogLimit

LIMIT, SHARE = 100, 40
messages = st.tuples(st.integers(0, 2 * LIMIT), st.sampled_from([0, 1]), st.sampled_from([None, "a", "b", "c"]))


@given(st.lists(messages | st.none(), max_size=60))
def test_try_add_equals_a_plain_sum(arriving):
    """None releases the oldest counted message."""
    backlog, waiting = BacklogLimit(LIMIT, SHARE), []
    for message in arriving:
        if message is None:
            if waiting:
                backlog.release(*waiting.pop(0))
            continue
        size, qos, client = message
        mine = sum(other for other, owner in waiting if owner == client)
        allowed = qos == 1 or (sum(other for other, _ in waiting) + size <= LIMIT and mine + size <= SHARE)
        assert backlog.try_add(size, qos, client) is allowed
        if allowed:
            waiting.append((size, client))
        assert set(backlog._client_bytes) >= {owner for other, owner in waiting if other}
        assert len(backlog._client_bytes) <= 4


@given(st.lists(messages, max_size=20))
def test_released_messages_leave_the_whole_limit(arriving):
    backlog = BacklogLimit(LIMIT)
    for size, client in [(size, client) for size, qos, client in arriving if backlog.try_add(size, qos, client)]:
        backlog.release(size, client)
    assert not backlog._client_bytes
    assert backlog.try_add(LIMIT, 0)
    assert not backlog.try_add(1, 0)


def test_a_flood_of_one_client_leaves_room_for_another():
    backlog = BacklogLimit(LIMIT, SHARE)
    assert sum(backlog.try_add(1, 0, "flood") for _ in range(1000)) == SHARE
    assert backlog.try_add(SHARE, 0, "other")
