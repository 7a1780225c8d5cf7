"""Ranks tokens without sorting the vocabulary: keys, the k largest, heapsort. Compiled by Numba, allocation-free.

A token's key packs its rank (logit descending, id ascending) into one int64: keys are distinct, and every filter keeps
a prefix of one strict order. Knows nothing of probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from edgelm.sampling.kernel_compiler import jit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[np.int32]
    Keys = NDArray[np.int64]

SCAN_BLOCK: Final = 64
"""Tokens of one block of a scan; most blocks are skipped after one comparison."""
MINUS_INF: Final = -0x7F800000
"""Rank of a logit of -inf."""


@jit("int64(int32)")
def rank_of(bits: np.int32) -> int:
    """Return an integer that orders as the float32 with these bits; -0.0 equals 0.0."""
    wide = np.int64(bits)
    return int(wide if wide >= 0 else -(wide & 0x7FFFFFFF))


@jit("int64(int64, int64)")
def key_of(rank: int, token: int) -> int:
    """Pack a rank and a token id into a key."""
    return (rank << 32) | (0xFFFFFFFF - token)


@jit("int64(int64)")
def token_of(key: int) -> int:
    """Return the token id of a key."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@jit("int64(int32[::1])")
def best_rank(bits: Bits) -> int:
    """Return the largest rank of int32 [n], at least `MINUS_INF`."""
    best = np.int64(MINUS_INF)
    for i in range(bits.size):
        best = max(best, rank_of(bits[i]))
    return int(best)


@jit("void(int64[::1], int64, int64)")
def sift(values: Keys, root: int, n: int) -> None:
    """Restore the max-heap of the first n values from the root down, in place."""
    value = values[root]
    while 2 * root + 1 < n:
        child = 2 * root + 1
        if child + 1 < n and values[child] < values[child + 1]:
            child += 1
        if values[child] <= value:
            break
        values[root] = values[child]
        root = child
    values[root] = value


@jit("void(int64[::1], int64)")
def sort(values: Keys, n: int) -> None:
    """Sort the first n values ascending, in place (heapsort, Williams 1964: O(n log n) in the worst case)."""
    for root in range(n // 2 - 1, -1, -1):
        sift(values, root, n)
    for last in range(n - 1, 0, -1):
        values[0], values[last] = values[last], values[0]
        sift(values, 0, last)


@jit("void(int64[::1], int64, int64)")
def partition_top(keys: Keys, n: int, k: int) -> None:
    """Move the k largest of the first n distinct keys to the front, in any order (quickselect, Hoare 1961)."""
    low, high = 0, n - 1
    while low < high:
        a, b, c = keys[low], keys[(low + high) // 2], keys[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            return


@jit("int64(int32[::1], int64, int64[::1])")
def gather_top_k(bits: Bits, k: int, keys: Keys) -> int:
    """Write the keys of the k likeliest tokens to `keys`, in any order; return their number.

    A block is scanned token by token only if its best token ranks above the k-th best so far, which is rare: in
    effect one vectorized pass over the vocabulary. Tokens at -inf are never collected.

    Parameters
    ----------
    bits
        int32 [V]: the bits of the logits.
    k
        In [1, V).
    keys
        int64 [min(2 k, V)], overwritten.
    """
    n = 0
    floor = np.int64(MINUS_INF)
    for start in range(0, bits.size, SCAN_BLOCK):
        block = bits[start : start + SCAN_BLOCK]
        if best_rank(block) <= floor:
            continue
        for i in range(block.size):
            rank = rank_of(block[i])
            if rank <= floor:
                continue
            keys[n] = key_of(rank, start + i)
            n += 1
            if n == keys.size:
                partition_top(keys, n, k)
                n = k
                floor = keys[0] >> 32
                for j in range(1, k):
                    floor = min(floor, keys[j] >> 32)
    if n > k:
        partition_top(keys, n, k)
        n = k
    return n
