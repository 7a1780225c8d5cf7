"""The radix tree compared with a plain list of sequences."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgelm.engine.radix_tree import RadixTree
from edgelm.types import UNCACHED_OWNER

TOKEN_BYTES = 2 * 3 * 5 * 4
"""Two arrays of 3 heads of 5 numbers."""

sequences = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=20)


def piece_of(tokens, start, stop):
    """Return arrays whose values encode all tokens up to each position."""
    marks = [hash(tuple(tokens[: i + 1])) % 2**20 for i in range(start, stop)]
    return [
        np.broadcast_to(np.array(marks, np.float32)[None, :, None] + k, (3, stop - start, 5)).copy() for k in (0, 1)
    ]


def cache_of(positions):
    return RadixTree(positions * (TOKEN_BYTES + 4), TOKEN_BYTES)


def keep(prefixes, tokens):
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return piece_of(tokens, start, stop)

    prefixes.insert(np.array(tokens, np.int32), read)
    return asked


def found(prefixes, tokens, **options):
    """Return the length of the match; check its arrays."""
    pieces = prefixes.match_prefix(np.array(tokens, np.int32), **options)
    if not pieces:
        return 0
    joined = [np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True)]
    length = joined[0].shape[1]
    for array, expected in zip(joined, piece_of(tokens, 0, length), strict=True):
        assert np.array_equal(array, expected)
    return length


def bytes_of(prefixes, owner=None):
    """Return the bytes of the tree without the pinned sequence."""
    kept = [node for node in prefixes._nodes(owner) if not node.is_pinned]
    return sum(array.nbytes for node in kept for array in (node.tokens, *node.piece))


def shared(one, other):
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(kept=sequences, asked=sequences)
def test_the_longest_known_prefix_is_found(kept, asked):
    prefixes = cache_of(1000)
    for i, tokens in enumerate(kept):
        known = max((shared(tokens, other) for other in kept[:i]), default=0)
        assert keep(prefixes, tokens) == ([(known, len(tokens))] if known < len(tokens) else [])
    for tokens in asked:
        assert found(prefixes, tokens) == max((shared(tokens, other) for other in kept), default=0)
    assert prefixes.tokens == len({tuple(tokens[: i + 1]) for tokens in kept for i in range(len(tokens))})
    assert bytes_of(prefixes) == prefixes.tokens * (TOKEN_BYTES + 4)


@given(kept=sequences, room=st.integers(0, 30))
def test_the_capacity_holds_and_the_newest_sequence_is_kept(kept, room):
    prefixes = cache_of(room)
    for tokens in kept:
        keep(prefixes, tokens)
        assert bytes_of(prefixes) <= room * (TOKEN_BYTES + 4)
        assert found(prefixes, tokens) == min(len(tokens), room)
        for other in kept:
            assert found(prefixes, other) <= len(other)


@given(pinned=st.lists(st.integers(0, 2), min_size=1, max_size=12), kept=sequences, room=st.integers(0, 30))
def test_a_pinned_sequence_stays_uncounted_and_uncopied(pinned, kept, room):
    prefixes = cache_of(room)
    arrays = piece_of(pinned, 0, len(pinned))
    prefixes.pin(np.array(pinned, np.int32), arrays)
    for tokens in kept:
        known = shared(tokens, pinned)
        assert all(start >= known for start, _ in keep(prefixes, tokens))
        assert found(prefixes, tokens) == min(len(tokens), known + room)
        assert bytes_of(prefixes) <= room * (TOKEN_BYTES + 4)
        for other in kept:
            assert found(prefixes, other, pinned_only=True) == shared(other, pinned)
        for node in prefixes._nodes():
            assert node.is_pinned == any(
                np.shares_memory(one, other) for one, other in zip(node.piece, arrays, strict=True)
            )
    assert found(prefixes, pinned) == len(pinned)


def test_the_least_recently_used_leaf_is_evicted_first():
    prefixes = cache_of(9)
    for tokens in ([0, 1, 2], [1, 1, 1], [2, 2, 2]):
        keep(prefixes, tokens)
    assert found(prefixes, [0, 1, 2]) == 3  # which also uses it
    keep(prefixes, [3])
    assert [found(prefixes, tokens) for tokens in ([0, 1, 2], [1, 1, 1], [2, 2, 2], [3])] == [3, 0, 3, 1]


def test_a_shared_prefix_outlives_its_leaves():
    prefixes = cache_of(8)
    for end in range(3, 9):
        keep(prefixes, [0, 1, 2, end, end])
        assert found(prefixes, [0, 1, 2, 99]) == 3
    assert found(prefixes, [0, 1, 2, 3, 3]) == 3
    assert found(prefixes, [0, 1, 2, 7, 7]) == 5


def test_entries_do_not_alias_their_source():
    prefixes = cache_of(100)
    rows = piece_of([1, 2, 3], 0, 3)
    prefixes.insert(np.array([1, 2, 3], np.int32), lambda start, stop: [array[:, start:stop].copy() for array in rows])
    tokens = np.array([1, 2, 4], np.int32)
    prefixes.insert(tokens, lambda start, stop: piece_of([1, 2, 4], start, stop))
    tokens[:] = 0
    assert found(prefixes, [1, 2, 3]) == 3
    assert found(prefixes, [1, 2, 4]) == 3


owners = st.sampled_from([None, "a", "b", "c"])


@given(kept=st.lists(st.tuples(owners, st.lists(st.integers(0, 2), max_size=12)), max_size=20), asked=sequences)
def test_an_owner_finds_only_its_own_and_the_pinned_sequence(kept, asked):
    prefixes, pinned = cache_of(1000), [0, 1, 1]
    prefixes.pin(np.array(pinned, np.int32), piece_of(pinned, 0, 3))
    for owner, tokens in kept:
        prefixes.insert(np.array(tokens, np.int32), lambda a, b, tokens=tokens: piece_of(tokens, a, b), owner)
    for owner in (None, "a", "b", "c", "newcomer", UNCACHED_OWNER):
        mine = [tokens for other, tokens in kept if other == owner]
        for tokens in asked:
            expected = max(shared(tokens, other) for other in [pinned, *mine])
            assert found(prefixes, tokens, owner=owner) == expected
    assert prefixes.tokens == sum(prefixes.count_of(owner) for owner in (None, "a", "b", "c"))
    assert set(prefixes._roots) == {owner for owner in (None, "a", "b", "c") if prefixes.count_of(owner)}


@given(kept=st.lists(st.tuples(owners, st.lists(st.integers(0, 2), max_size=12)), max_size=30), room=st.integers(0, 30))
def test_owners_share_the_capacity_and_the_largest_loses(kept, room):
    prefixes, everyone = cache_of(room), (None, "a", "b", "c")
    for owner, tokens in kept:
        before = {each: prefixes.count_of(each) for each in everyone}
        prefixes.insert(np.array(tokens, np.int32), lambda a, b, tokens=tokens: piece_of(tokens, a, b), owner)
        after = {each: prefixes.count_of(each) for each in everyone}
        assert prefixes.tokens == sum(after.values()) <= room
        assert sum(bytes_of(prefixes, each) for each in everyone) == prefixes.tokens * (TOKEN_BYTES + 4)
        for each in everyone:
            if each != owner and after[each] < before[each]:
                assert before[each] >= room // len(everyone), "whoever has its part or less keeps it"


def test_cache_isolated_sequences_are_not_kept():
    prefixes = cache_of(100)
    prefixes.insert(np.array([1, 2, 3], np.int32), lambda a, b: piece_of([1, 2, 3], a, b), UNCACHED_OWNER)
    assert prefixes.tokens == 0
    assert found(prefixes, [1, 2, 3], owner=UNCACHED_OWNER) == 0
