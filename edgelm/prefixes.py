"""Key/value memory of earlier sequences, shared by later ones that begin alike: a radix tree over tokens.

The idea is RadixAttention's (Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model Programs",
arXiv:2312.07104, section 3): what several sequences share is kept once, and the least recently used end of a sequence
goes first. Knows nothing of sessions: a piece is a list of arrays whose second axis are positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]
Piece = list[NDArray[Any]]
"""Keys and values of every layer at some positions, float32 or int8 [kv_heads, n, head_size] each."""

Read = Callable[[int, int], Piece]
"""Copies positions [start, stop) out of a row."""


class _Node:
    """Positions that follow those of the parent; the root has none. What is pinned has only pinned ancestors."""

    __slots__ = ("children", "is_pinned", "parent", "piece", "tokens", "used")

    def __init__(self, tokens: Tokens, piece: Piece, parent: _Node | None, *, is_pinned: bool = False) -> None:
        self.tokens = tokens
        self.piece = piece
        self.parent = parent
        self.is_pinned = is_pinned
        self.used = 0
        self.children: dict[int, _Node] = {}


class Prefixes:
    """Pieces of key/value memory of at most `max_bytes` together, each position `token_bytes` large."""

    def __init__(self, max_bytes: int, token_bytes: int) -> None:
        self._capacity = max_bytes // (token_bytes + np.dtype(np.int32).itemsize)
        self._root = _Node(np.zeros(0, np.int32), [], None)
        self._clock = 0
        self.tokens = 0
        """Positions that are kept, pinned ones not counted."""

    def pin(self, tokens: Tokens, piece: Piece) -> None:
        """Know a first sequence, int32 [n] with n > 0, for good: it takes no room, and its arrays are not copied."""
        if self._root.children:
            raise AssertionError("pinned before anything is kept")
        self._root.children[int(tokens[0])] = _Node(tokens, piece, self._root, is_pinned=True)

    def find(self, tokens: Tokens, *, pinned_only: bool = False) -> list[Piece]:
        """Return pieces that together are the longest known prefix of `tokens`, int32 [n]; none where none is known."""
        passed = [(node, shared) for node, shared in self._walk(tokens) if node.is_pinned or not pinned_only]
        self._use(node for node, _ in passed)
        return [[array[:, :shared] for array in node.piece] for node, shared in passed]

    def keep(self, tokens: Tokens, read: Read) -> None:
        """Keep a sequence, int32 [n], as far as there is room; `read` is asked for what is not known yet."""
        free = sum(shared for node, shared in self._walk(tokens) if node.is_pinned)
        tokens = np.array(tokens[: free + self._capacity], np.int32)
        passed = self._walk(tokens)
        known = sum(shared for _, shared in passed)
        path = [node for node, _ in passed]
        if known < len(tokens):
            if path and passed[-1][1] < len(path[-1].tokens):
                path[-1] = self._split(*passed[-1])
            end = path[-1] if path else self._root
            path.append(_Node(tokens[known:], read(known, len(tokens)), end))
            end.children[int(tokens[known])] = path[-1]
            self.tokens += len(tokens) - known
        self._use(path)
        while self.tokens > self._capacity:
            ends = (node for node in self._nodes() if not node.children and not node.is_pinned)
            self._drop(min(ends, key=lambda node: node.used))

    def _use(self, nodes: Iterable[_Node]) -> None:
        self._clock += 1
        for node in nodes:
            node.used = self._clock

    def _walk(self, tokens: Tokens) -> list[tuple[_Node, int]]:
        """Return the nodes that `tokens` pass, and how many positions of each they share, all but for the last."""
        passed: list[tuple[_Node, int]] = []
        node: _Node | None = self._root.children.get(int(tokens[0])) if len(tokens) else None
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

    def _drop(self, leaf: _Node) -> None:
        """Forget the end of a sequence."""
        if leaf.parent is None:
            raise AssertionError("the root stays")
        del leaf.parent.children[int(leaf.tokens[0])]
        self.tokens -= len(leaf.tokens)

    def _nodes(self) -> Iterator[_Node]:
        """Every node but the root."""
        waiting = list(self._root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())
