"""What waits for the owner never exceeds the limit by a message that may be dropped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgelm.mqtt.backlog import Backlog

LIMIT = 100
messages = st.tuples(st.integers(0, 2 * LIMIT), st.sampled_from([0, 1]))


@given(st.lists(messages | st.none(), max_size=40))
def test_it_takes_what_a_plain_sum_allows(arriving):
    """None settles the oldest message that was taken."""
    backlog, waiting = Backlog(LIMIT), []
    for message in arriving:
        if message is None:
            if waiting:
                backlog.settle(waiting.pop(0))
            continue
        size, qos = message
        allowed = qos == 1 or sum(waiting) + size <= LIMIT
        assert backlog.takes(size, qos) is allowed
        if allowed:
            waiting.append(size)


@given(st.lists(messages, max_size=20))
def test_what_is_settled_leaves_room_for_everything_again(arriving):
    backlog = Backlog(LIMIT)
    for size in [size for size, qos in arriving if backlog.takes(size, qos)]:
        backlog.settle(size)
    assert backlog.takes(LIMIT, 0)
    assert not backlog.takes(1, 0)
