"""`FairQueue` is round-robin between names; `FairnessPolicy` chooses the name with the fewest running items."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.engine.fairness import FairnessPolicy, FairQueue

names = st.sampled_from([None, "a", "b", "c"])


@given(st.lists(names | st.just("take"), max_size=80))
def test_fair_queue_is_round_robin_between_names_and_fifo_for_each(plan):
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
            assert passed[other] <= 3, "at max_running one item of each other name goes first"
        assert len(queue) == len(waiting)


@given(
    plan=st.lists(st.tuples(names, st.booleans()), max_size=60),
    rows=st.integers(1, 5),
    max_running=st.none() | st.integers(1, 3),
)
def test_the_name_with_the_fewest_running_items_is_next(plan, rows, max_running):
    policy, waiting, running = FairnessPolicy(max_running), [], []
    for number, (name, ends) in enumerate(plan):
        waiting.append((name, number))
        if ends and running:
            running.pop(0)
        while len(running) < rows:
            chosen = policy.choose(waiting, running, lambda item: item[0])
            counts = Counter(running)
            able = [item for item in waiting if max_running is None or counts[item[0]] < max_running]
            if chosen is None:
                assert not able
                break
            assert counts[chosen[0]] == min(counts[name] for name, _ in able)
            assert chosen[1] == min(number for name, number in waiting if name == chosen[0])
            waiting.remove(chosen)
            running.append(chosen[0])
            policy.record_served(chosen[0], [name for name, _ in waiting])
            assert max_running is None or Counter(running)[chosen[0]] <= max_running
            assert len(policy._served) <= 5


def test_an_item_of_another_name_overtakes_fifty_of_one():
    policy, waiting = FairnessPolicy(), [("a", i) for i in range(50)]
    first = policy.choose(waiting, [], lambda item: item[0])
    waiting.remove(first)
    policy.record_served("a", ["a"])
    waiting.append(("b", 0))
    assert policy.choose(waiting, [], lambda item: item[0]) == ("b", 0)
