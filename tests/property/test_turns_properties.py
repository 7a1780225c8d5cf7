"""Turns between those who wait: nobody waits behind more than one of each other, and nobody runs more than allowed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.engine.fairness import FairnessPolicy, FairQueue

names = st.sampled_from([None, "a", "b", "c"])


@given(st.lists(names | st.just("take"), max_size=80))
def test_each_name_is_served_in_order_and_waits_for_one_of_each_other(plan):
    queue, waiting = FairQueue(), []
    passed = Counter()
    for number, what in enumerate(plan):
        if what != "take":
            queue.put(what, (what, number))
            waiting.append((what, number))
            continue
        if not waiting:
            with pytest.raises(IndexError):
                queue.get()
            continue
        name, taken = queue.get()
        assert taken == next(number for owner, number in waiting if owner == name)
        waiting.remove((name, taken))
        passed[name] = 0
        for other in {owner for owner, _ in waiting} - {name}:
            passed[other] += 1
            assert passed[other] <= 3, "one of each other name at most goes first"
        assert len(queue) == len(waiting)


@given(
    plan=st.lists(st.tuples(names, st.booleans()), max_size=60),
    rows=st.integers(1, 5),
    most=st.none() | st.integers(1, 3),
)
def test_the_one_with_the_fewest_running_begins_next(plan, rows, most):
    turns, waiting, running = FairnessPolicy(most), [], []
    for number, (name, ends) in enumerate(plan):
        waiting.append((name, number))
        if ends and running:
            running.pop(0)
        while len(running) < rows:
            chosen = turns.choose(waiting, running, lambda item: item[0])
            counts = Counter(running)
            able = [item for item in waiting if most is None or counts[item[0]] < most]
            if chosen is None:
                assert not able
                break
            assert counts[chosen[0]] == min(counts[name] for name, _ in able)
            assert chosen[1] == min(number for name, number in waiting if name == chosen[0])
            waiting.remove(chosen)
            running.append(chosen[0])
            turns.record_served(chosen[0], [name for name, _ in waiting])
            assert most is None or Counter(running)[chosen[0]] <= most
            assert len(turns._served) <= 5


def test_fifty_of_one_and_one_of_another_is_second_with_a_single_row():
    turns, waiting = FairnessPolicy(), [("a", i) for i in range(50)]
    first = turns.choose(waiting, [], lambda item: item[0])
    waiting.remove(first)
    turns.record_served("a", ["a"])
    waiting.append(("b", 0))
    assert turns.choose(waiting, [], lambda item: item[0]) == ("b", 0)
