"""A radix tree over tokens: keys and values of earlier sequences, shared by sequences with a common prefix.

After RadixAttention (Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model Programs",
arXiv:2312.07104, section 3): a common prefix is stored once, and the least recently used leaf is evicted first. Each
owner has its own tree, so that neither a count nor a duration reveals another owner's sequences. Knows nothing of
requests: a piece is a list of arrays whose second axis is the position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from edgelm.runtime.kv_cache import KvSegment, Tokens
from edgelm.types import UNCACHED_OWNER, Owner

Read = Callable[[int, int], KvSegment]
"""Returns copies of positions [start, stop) of a row."""


class _Node:
    """Positions that follow those of the parent; the root has none. Ancestors of a pinned node are pinned."""

    __slots__ = ("children", "is_pinned", "parent", "piece", "tokens", "used")

    def __init__(self, tokens: Tokens, piece: KvSegment, parent: _Node | None, *, is_pinned: bool = False) -> None:
        self.tokens = tokens
        self.piece = piece
        self.parent = parent
        self.is_pinned = is_pinned
        self.used = 0
        self.children: dict[int, _Node] = {}


class RadixTree:
    """Keys and values of at most `max_bytes` in total, `token_bytes` for each position.

    Owners share the bytes: if they are exceeded, the owner with the most positions loses its least recently used ones.
    """

    def __init__(self, max_bytes: int, token_bytes: int) -> None:
        self._capacity = max_bytes // (token_bytes + np.dtype(np.int32).itemsize)
        self._pinned: tuple[Tokens, KvSegment] | None = None
        self._roots: dict[Owner, _Node] = {}
        """The tree of each owner with positions of its own; all of them share the arrays of the pinned sequence."""
        self._counts: dict[Owner, int] = {}
        """Positions of each of them without pinned ones, at least 1."""
        self._clock = 0
        self.tokens = 0
        """Positions of all owners without pinned ones."""

    def pin(self, tokens: Tokens, piece: KvSegment) -> None:
        """Add a permanent sequence, int32 [n] with n > 0, to every tree; it is not counted, and not copied."""
        if self._roots or self._pinned is not None:
            raise AssertionError("pin() must be called once, before insert()")
        self._pinned = (tokens, piece)

    def match_prefix(self, tokens: Tokens, owner: Owner = None, *, pinned_only: bool = False) -> list[KvSegment]:
        """Return the pieces of the longest prefix of `tokens`, int32 [n], in the owner's tree; views, not copies."""
        passed = [
            (node, shared) for node, shared in _walk(tokens, self._root_of(owner)) if node.is_pinned or not pinned_only
        ]
        self._touch(node for node, _ in passed)
        return [[array[:, :shared] for array in node.piece] for node, shared in passed]

    def insert(self, tokens: Tokens, read: Read, owner: Owner = None) -> None:
        """Add an owner's sequence, int32 [n], as far as it fits; `read` returns positions that are not known yet."""
        if owner == UNCACHED_OWNER:
            return
        root = self._root_of(owner)
        pinned = sum(shared for node, shared in _walk(tokens, root) if node.is_pinned)
        tokens = np.array(tokens[: pinned + self._capacity], np.int32)
        passed = _walk(tokens, root)
        known = sum(shared for _, shared in passed)
        path = [node for node, _ in passed]
        if known < len(tokens):
            if path and passed[-1][1] < len(path[-1].tokens):
                path[-1] = self._split(*passed[-1])
            parent = path[-1] if path else root
            self._roots[owner] = root
            path.append(_Node(tokens[known:], read(known, len(tokens)), parent))
            parent.children[int(tokens[known])] = path[-1]
            self._count(owner, len(tokens) - known)
        self._touch(path)
        while self.tokens > self._capacity:
            largest = max(self._counts, key=lambda each: self._counts[each])
            leaves = (node for node in self._nodes(largest) if not node.children and not node.is_pinned)
            leaf, excess = min(leaves, key=lambda node: node.used), self.tokens - self._capacity
            if leaf.used == self._clock and excess < len(leaf.tokens):  # the newest one, a part of which fits
                self._shorten(leaf, len(leaf.tokens) - excess, largest)
            else:
                self._drop(leaf, largest)

    def count_of(self, owner: Owner) -> int:
        """Return the number of an owner's positions without pinned ones."""
        return self._counts.get(owner, 0)

    def _root_of(self, owner: Owner) -> _Node:
        """Return the root of an owner's tree, or of a new tree with the pinned sequence, which is not stored."""
        root = self._roots.get(owner)
        if root is None:
            root = _Node(np.zeros(0, np.int32), [], None)
            if self._pinned is not None:
                tokens, piece = self._pinned
                root.children[int(tokens[0])] = _Node(tokens, piece, root, is_pinned=True)
        return root

    def _count(self, owner: Owner, change: int) -> None:
        """Add to the count of an owner's positions; remove its tree if none are left."""
        self.tokens += change
        self._counts[owner] = self._counts.get(owner, 0) + change
        if not self._counts[owner]:
            del self._counts[owner], self._roots[owner]

    def _touch(self, nodes: Iterable[_Node]) -> None:
        self._clock += 1
        for node in nodes:
            node.used = self._clock

    def _split(self, node: _Node, at: int) -> _Node:
        """Split a node after `at` positions; return the first half. Copies: a view would keep both halves alive."""
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
        """Remove all but the first `length` positions of a leaf."""
        self._count(owner, length - len(leaf.tokens))
        leaf.tokens, leaf.piece = leaf.tokens[:length].copy(), [array[:, :length].copy() for array in leaf.piece]

    def _drop(self, leaf: _Node, owner: Owner) -> None:
        """Remove a leaf."""
        if leaf.parent is None:
            raise AssertionError("the root is not a leaf")
        del leaf.parent.children[int(leaf.tokens[0])]
        self._count(owner, -len(leaf.tokens))

    def _nodes(self, owner: Owner = None) -> Iterator[_Node]:
        """Yield every node of an owner's tree except the root."""
        waiting = list(self._root_of(owner).children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())


def _walk(tokens: Tokens, root: _Node) -> list[tuple[_Node, int]]:
    """Return the nodes on the path of `tokens`, and how many positions of each agree: all, except in the last node."""
    passed: list[tuple[_Node, int]] = []
    node: _Node | None = root.children.get(int(tokens[0])) if len(tokens) else None
    at = 0
    while node is not None:
        count = min(len(node.tokens), len(tokens) - at)
        differs = np.flatnonzero(node.tokens[:count] != tokens[at : at + count])
        shared = int(differs[0]) if len(differs) else count
        passed.append((node, shared))
        at += shared
        continues = shared == len(node.tokens) and at < len(tokens)
        node = node.children.get(int(tokens[at])) if continues else None
    return passed
