"""Key/value memory of earlier sequences, shared by later ones that begin alike: a radix tree over tokens.

The idea is RadixAttention's (Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model Programs",
arXiv:2312.07104, section 3): what several sequences share is kept once, and the least recently used end of a sequence
goes first. Each owner has a tree of its own: nobody can tell, by a count or by the time that it takes, what another
owner's sequences were. Knows nothing of sessions: a piece is a list of arrays whose second axis are positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from edgelm.runtime.kv_cache import KvSegment, Tokens
from edgelm.types import UNCACHED_OWNER, Owner

Read = Callable[[int, int], KvSegment]
"""Copies positions [start, stop) out of a row."""


class _Node:
    """Positions that follow those of the parent; the root has none. What is pinned has only pinned ancestors."""

    __slots__ = ("children", "is_pinned", "parent", "piece", "tokens", "used")

    def __init__(self, tokens: Tokens, piece: KvSegment, parent: _Node | None, *, is_pinned: bool = False) -> None:
        self.tokens = tokens
        self.piece = piece
        self.parent = parent
        self.is_pinned = is_pinned
        self.used = 0
        self.children: dict[int, _Node] = {}


class RadixTree:
    """Pieces of key/value memory of at most `max_bytes` together, each position `token_bytes` large.

    Owners share the bytes: when these are full, the owner that keeps most loses what it used longest ago.
    """

    def __init__(self, max_bytes: int, token_bytes: int) -> None:
        self._capacity = max_bytes // (token_bytes + np.dtype(np.int32).itemsize)
        self._pinned: tuple[Tokens, KvSegment] | None = None
        self._roots: dict[Owner, _Node] = {}
        """A tree for each owner that keeps something; all have the pinned sequence, whose arrays they share."""
        self._kept: dict[Owner, int] = {}
        """Positions that each of them keeps, pinned ones not counted: at least one."""
        self._clock = 0
        self.tokens = 0
        """Positions that are kept, pinned ones not counted."""

    def pin(self, tokens: Tokens, piece: KvSegment) -> None:
        """Know a first sequence, int32 [n] with n > 0, for good: it takes no room, and its arrays are not copied."""
        if self._roots or self._pinned is not None:
            raise AssertionError("pinned once, before anything is kept")
        self._pinned = (tokens, piece)

    def match_prefix(self, tokens: Tokens, owner: Owner = None, *, pinned_only: bool = False) -> list[KvSegment]:
        """Return pieces that together are the longest prefix of `tokens`, int32 [n], that the owner knows, if any."""
        passed = [
            (node, shared) for node, shared in _walk(tokens, self._root_of(owner)) if node.is_pinned or not pinned_only
        ]
        self._use(node for node, _ in passed)
        return [[array[:, :shared] for array in node.piece] for node, shared in passed]

    def insert(self, tokens: Tokens, read: Read, owner: Owner = None) -> None:
        """Keep an owner's sequence, int32 [n], as far as there is room; `read` is asked for what is not known yet."""
        if owner == UNCACHED_OWNER:
            return
        root = self._root_of(owner)
        free = sum(shared for node, shared in _walk(tokens, root) if node.is_pinned)
        tokens = np.array(tokens[: free + self._capacity], np.int32)
        passed = _walk(tokens, root)
        known = sum(shared for _, shared in passed)
        path = [node for node, _ in passed]
        if known < len(tokens):
            if path and passed[-1][1] < len(path[-1].tokens):
                path[-1] = self._split(*passed[-1])
            end = path[-1] if path else root
            self._roots[owner] = root
            path.append(_Node(tokens[known:], read(known, len(tokens)), end))
            end.children[int(tokens[known])] = path[-1]
            self._count(owner, len(tokens) - known)
        self._use(path)
        while self.tokens > self._capacity:
            loser = max(self._kept, key=lambda each: self._kept[each])
            ends = (node for node in self._nodes(loser) if not node.children and not node.is_pinned)
            end, excess = min(ends, key=lambda node: node.used), self.tokens - self._capacity
            if end.used == self._clock and excess < len(end.tokens):  # the newest, which fits beside the others in part
                self._shorten(end, len(end.tokens) - excess, loser)
            else:
                self._drop(end, loser)

    def kept_by(self, owner: Owner) -> int:
        """Return how many positions an owner keeps, pinned ones not counted."""
        return self._kept.get(owner, 0)

    def _root_of(self, owner: Owner) -> _Node:
        """Return an owner's tree, or a new one that is not its own yet, with the pinned sequence."""
        root = self._roots.get(owner)
        if root is None:
            root = _Node(np.zeros(0, np.int32), [], None)
            if self._pinned is not None:
                tokens, piece = self._pinned
                root.children[int(tokens[0])] = _Node(tokens, piece, root, is_pinned=True)
        return root

    def _count(self, owner: Owner, more: int) -> None:
        """Note that an owner keeps so many positions more, or less; forget the tree of one that keeps none."""
        self.tokens += more
        self._kept[owner] = self._kept.get(owner, 0) + more
        if not self._kept[owner]:
            del self._kept[owner], self._roots[owner]

    def _use(self, nodes: Iterable[_Node]) -> None:
        self._clock += 1
        for node in nodes:
            node.used = self._clock

    def _split(self, node: _Node, at: int) -> _Node:
        """Cut a node in two after `at` positions; return the first. Copies let go of what is dropped later."""
        first, second = ([array[:, part] for array in node.piece] for part in (slice(at), slice(at, None)))
        if not node.is_pinned:
            first, second = ([array.copy() for array in half] for half in (first, second))
        head = _Node(node.tokens[:at].copy(), first, node.parent, is_pinned=node.is_pinned)
        if node.parent is not None:
            node.parent.children[int(head.tokens[0])] = head
        node.tokens, node.piece = node.tokens[at:].copy(), second
        node.parent = head
        head.children[int(node.tokens[0])] = node
        return head

    def _shorten(self, leaf: _Node, length: int, owner: Owner) -> None:
        """Forget what follows the first `length` positions of an end of an owner's sequence."""
        self._count(owner, length - len(leaf.tokens))
        leaf.tokens, leaf.piece = leaf.tokens[:length].copy(), [array[:, :length].copy() for array in leaf.piece]

    def _drop(self, leaf: _Node, owner: Owner) -> None:
        """Forget the end of an owner's sequence."""
        if leaf.parent is None:
            raise AssertionError("the root stays")
        del leaf.parent.children[int(leaf.tokens[0])]
        self._count(owner, -len(leaf.tokens))

    def _nodes(self, owner: Owner = None) -> Iterator[_Node]:
        """Every node of an owner but the root."""
        waiting = list(self._root_of(owner).children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())


def _walk(tokens: Tokens, root: _Node) -> list[tuple[_Node, int]]:
    """Return the nodes that `tokens` pass, and how many positions of each they share, all but for the last."""
    passed: list[tuple[_Node, int]] = []
    node: _Node | None = root.children.get(int(tokens[0])) if len(tokens) else None
    at = 0
    while node is not None:
        count = min(len(node.tokens), len(tokens) - at)
        differs = np.flatnonzero(node.tokens[:count] != tokens[at : at + count])
        shared = int(differs[0]) if len(differs) else count
        passed.append((node, shared))
        at += shared
        whole = shared == len(node.tokens) and at < len(tokens)
        node = node.children.get(int(tokens[at])) if whole else None
    return passed
