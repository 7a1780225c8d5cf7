"""The arithmetic of sampling over one row of logits, compiled by Numba.

Pure and allocation-free: scratch memory comes from the caller, randomness is one number in [0, 1).

Every token has a rank (logit descending, id ascending) packed into one int64 key, so that top-k, top-p and min-p each
keep a prefix of one strict order. Probabilities are 40-bit fixed-point weights: integer sums do not depend on their
order, so the compiler may vectorize them, and compiled, interpreted, x86 and ARM runs agree bit for bit. That is why
no fast-math flag is set: contraction and reassociation would break the agreement, nnan and ninf the -inf of masks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from numba import njit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Bits = NDArray[np.int32]
    Keys = NDArray[np.int64]

ONE: Final = float(2**40)
"""The weight of the likeliest token."""
BLOCK: Final = 64
"""Tokens looked at together where most can be skipped at once."""
BINS: Final = 2048
"""Histogram bins of the top-p search: 32 to every halving of the probability, 62 halvings."""

_LOG2_E: Final = 1.4426950408889634
_LN_2: Final = 0.6931471805599453
_LOWEST: Final = -62.0
_NEVER: Final = np.iinfo(np.int32).min
_RANK_OF_MINUS_INF: Final = -0x7F800000


def scratch_size(vocab_size: int) -> int:
    """Return the int64 words that `sample_all` needs as `masses` for this vocabulary."""
    return max(BINS, -(-vocab_size // BLOCK))


@njit("void(float32[::1], uint32[::1])", cache=True, nogil=True)
def mask_logits(logits: Floats, mask: NDArray[np.uint32]) -> None:
    """Set the logits of tokens that the mask forbids to -inf.

    Parameters
    ----------
    logits
        float32 [V], changed in place.
    mask
        uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 belongs to token i.
    """
    for word in range(mask.size):
        bits = int(mask[word])
        if bits == 0xFFFFFFFF:
            continue
        start = word * 32
        for i in range(start, min(start + 32, logits.size)):
            if (bits >> (i - start)) & 1 == 0:
                logits[i] = -np.inf


@njit("void(float32[::1], int32[::1], uint32[::1], float32)", cache=True, nogil=True)
def penalize(logits: Floats, history: Bits, seen: NDArray[np.uint32], penalty: np.float32) -> None:
    """Make tokens of the history less likely (CTRL, Keskar et al. 2019, section 4.1).

    A positive logit is divided by the penalty and, our deviation and transformers', a negative one multiplied, as
    division would make it likelier. Each distinct token is penalized once.

    Parameters
    ----------
    logits
        float32 [V], changed in place.
    history
        int32 [n]; ids outside [0, V) are ignored.
    seen
        uint32 [ceil(V / 32)], all zero; all zero again afterwards.
    penalty
        Above 0; 1 changes nothing.
    """
    for j in range(history.size):
        token = int(history[j])
        if token < 0 or token >= logits.size:
            continue
        bit = 1 << (token & 31)
        if int(seen[token >> 5]) & bit:
            continue
        seen[token >> 5] = int(seen[token >> 5]) | bit
        value = logits[token]
        logits[token] = value * penalty if value < 0 else value / penalty
    for j in range(history.size):
        token = int(history[j])
        if 0 <= token < logits.size:
            seen[token >> 5] = 0


@njit("float64(float32, float64, float64)", cache=True, nogil=True)
def halvings(logit: np.float32, top: float, inverse_temperature: float) -> float:
    """Return log2 of a token's probability over the likeliest one's, clamped to [-62, 0]."""
    y = (np.float64(logit) - top) * inverse_temperature * _LOG2_E
    return y if y > _LOWEST else _LOWEST


@njit("int64(float64)", cache=True, nogil=True)
def weight(y: float) -> int:
    """Return 2**y as a 40-bit fixed-point number, y in [-62, 0]; 0 below about 2**-41.

    Only IEEE additions, multiplications and a shift, since the exp of libm differs between machines in the last bit.
    The Taylor series of degree 9 errs by less than 1e-11, relatively.
    """
    n = int(0.5 - y)
    t = (y + n) * _LN_2  # within [-0.35, 0.35]
    series = 1.0 + t / 9.0
    series = 1.0 + series * t * (1.0 / 8.0)
    series = 1.0 + series * t * (1.0 / 7.0)
    series = 1.0 + series * t * (1.0 / 6.0)
    series = 1.0 + series * t * (1.0 / 5.0)
    series = 1.0 + series * t * (1.0 / 4.0)
    series = 1.0 + series * t * (1.0 / 3.0)
    series = 1.0 + series * t * (1.0 / 2.0)
    series = 1.0 + series * t
    return int(series * ONE) >> n


@njit("int64(int32)", cache=True, nogil=True)
def rank_of(bits: np.int32) -> int:
    """Map the bits of a float32 to an integer of the same order; -0.0 equals 0.0."""
    wide = np.int64(bits)
    return wide if wide >= 0 else -(wide & 0x7FFFFFFF)


@njit("int64(int64, int64)", cache=True, nogil=True)
def key_of(rank: int, token: int) -> int:
    """Pack rank and id so that keys descend by logit, then ascend by id."""
    return (rank << 32) | (0xFFFFFFFF - token)


@njit("int64(int64)", cache=True, nogil=True)
def token_of(key: int) -> int:
    """Return the token id of a key."""
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@njit("void(int64[::1], int64, int64)", cache=True, nogil=True)
def sift(values: Keys, root: int, n: int) -> None:
    """Move the root of a max-heap of n values down to its place."""
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


@njit("void(int64[::1], int64)", cache=True, nogil=True)
def sort(values: Keys, n: int) -> None:
    """Sort the first n values ascending, in place (heapsort: no memory, no worst case)."""
    for first in range(n // 2 - 1, -1, -1):
        sift(values, first, n)
    for last in range(n - 1, 0, -1):
        values[0], values[last] = values[last], values[0]
        sift(values, 0, last)


@njit("void(int64[::1], int64, int64)", cache=True, nogil=True)
def partition_top(keys: Keys, n: int, k: int) -> None:
    """Move the k largest of the first n distinct keys to the front, in any order (quickselect, Hoare 1961)."""
    low, high = 0, n - 1
    while low < high:
        middle = (low + high) // 2
        a, b, c = keys[low], keys[middle], keys[high]
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


@njit("int64(int32[::1], int64, int64[::1])", cache=True, nogil=True)
def gather_top_k(bits: Bits, k: int, keys: Keys) -> int:
    """Collect the keys of the k likeliest tokens into `keys`, in any order; return how many there are.

    A block is looked at closely only where its best token beats the k-th best so far, which is rare: one vectorized
    pass over the vocabulary. Tokens at -inf are never collected.

    Parameters
    ----------
    bits
        int32 [V]: the logits' bits.
    k
        In [1, V).
    keys
        int64 [min(2 k, V)], overwritten.
    """
    n = 0
    floor = np.int64(_RANK_OF_MINUS_INF)
    for start in range(0, bits.size, BLOCK):
        stop = min(start + BLOCK, bits.size)
        best = np.int64(_RANK_OF_MINUS_INF)
        for i in range(start, stop):
            best = max(best, rank_of(bits[i]))
        if best <= floor:
            continue
        for i in range(start, stop):
            rank = rank_of(bits[i])
            if rank <= floor:
                continue
            keys[n] = key_of(rank, i)
            n += 1
            if n == keys.size:
                partition_top(keys, n, k)
                n = k
                for j in range(k):
                    rank = keys[j] >> 32
                    floor = rank if j == 0 else min(floor, rank)
    if n > k:
        partition_top(keys, n, k)
        n = k
    return n


@njit("int64(float64, int64)", cache=True, nogil=True)
def mass_limit(top_p: float, total: int) -> int:
    """Return the mass at which the nucleus is full: a token belongs to it while the mass above it is less."""
    if top_p >= 1.0:
        return total
    return min(max(int(math.ceil(top_p * np.float64(total))), 1), total)


@njit(
    "int64(float32[::1], int32[::1], float64, float64, int64, float64, float64, float64, int64[::1])",
    cache=True,
    nogil=True,
)
def sample_top_k(
    logits: Floats,
    bits: Bits,
    top: float,
    inverse_temperature: float,
    k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    keys: Keys,
) -> int:
    """Draw from the k likeliest tokens, narrowed by top-p (of their mass) and min-p. See `sample_all`.

    Parameters
    ----------
    k
        In [1, V).
    keys
        int64 [min(2 k, V)], overwritten.
    """
    n = gather_top_k(bits, k, keys)
    sort(keys, n)
    total = 0
    for i in range(n):
        total += weight(halvings(logits[token_of(keys[i])], top, inverse_temperature))
    limit = mass_limit(top_p, total)
    least = int(math.ceil(min_p * ONE))
    first = n
    mass = 0
    while first > 0 and mass < limit:
        share = weight(halvings(logits[token_of(keys[first - 1])], top, inverse_temperature))
        if share < least:
            break
        mass += share
        first -= 1
    for i in range(first, n):
        keys[i - first] = token_of(keys[i])
    sort(keys, n - first)
    left = min(int(uniform * np.float64(mass)), mass - 1)
    for i in range(n - first):
        token = keys[i]
        left -= weight(halvings(logits[token], top, inverse_temperature))
        if left < 0:
            return token
    return -1  # cannot be: the kept weights sum to mass


@njit(
    "int64(float32[::1], int32[::1], float64, float64, float64, int64[::1], int64[::1])",
    cache=True,
    nogil=True,
)
def nucleus_key(
    logits: Floats, bits: Bits, top: float, inverse_temperature: float, top_p: float, keys: Keys, masses: Keys
) -> int:
    """Return the lowest key inside the nucleus: the fewest likeliest tokens that hold `top_p` of the mass.

    A histogram of the mass over log-probability finds the bin where the nucleus ends; only that bin is sorted.

    Parameters
    ----------
    keys
        int64 [V], overwritten.
    masses
        int64 [at least BINS], overwritten.
    """
    masses[:BINS] = 0
    total = 0
    for i in range(logits.size):
        y = halvings(logits[i], top, inverse_temperature)
        share = weight(y)
        masses[int(y * -32.0)] += share
        total += share
    limit = mass_limit(top_p, total)
    last = 0
    mass = 0
    while mass + masses[last] < limit:
        mass += masses[last]
        last += 1
    n = 0
    for i in range(logits.size):
        if int(halvings(logits[i], top, inverse_temperature) * -32.0) == last:
            keys[n] = key_of(rank_of(bits[i]), i)
            n += 1
    sort(keys, n)
    while mass < limit:
        n -= 1
        mass += weight(halvings(logits[token_of(keys[n])], top, inverse_temperature))
    return keys[n]


@njit(
    "int64(float32[::1], int32[::1], float64, float64, float64, float64, float64, int64[::1], int64[::1])",
    cache=True,
    nogil=True,
)
def sample_all(
    logits: Floats,
    bits: Bits,
    top: float,
    inverse_temperature: float,
    top_p: float,
    min_p: float,
    uniform: float,
    keys: Keys,
    masses: Keys,
) -> int:
    """Draw a token from the whole vocabulary, narrowed by top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024).

    Kept tokens are lined up by id, each as long as its weight; the one at `uniform` of the whole length is drawn.

    Parameters
    ----------
    logits, bits
        float32 [V], no NaN, and the same memory as int32 [V].
    top
        The largest logit, finite.
    inverse_temperature
        In (0, 1e30].
    top_p, min_p
        In [0, 1]; 1 and 0 are off. At least the likeliest token is kept.
    uniform
        In [0, 1).
    keys
        int64 [V], overwritten.
    masses
        int64 [scratch_size(V)], overwritten.
    """
    lowest = key_of(np.int64(_NEVER), 0)
    if top_p < 1.0:
        lowest = nucleus_key(logits, bits, top, inverse_temperature, top_p, keys, masses)
    least = int(math.ceil(min_p * ONE))
    mass = 0
    blocks = (logits.size + BLOCK - 1) // BLOCK
    for block in range(blocks):
        masses[block] = 0
        for i in range(block * BLOCK, min((block + 1) * BLOCK, logits.size)):
            if key_of(rank_of(bits[i]), i) >= lowest:
                share = weight(halvings(logits[i], top, inverse_temperature))
                masses[block] += share if share >= least else 0
        mass += masses[block]
    left = min(int(uniform * np.float64(mass)), mass - 1)
    block = 0
    while left >= masses[block]:
        left -= masses[block]
        block += 1
    for i in range(block * BLOCK, logits.size):
        if key_of(rank_of(bits[i]), i) >= lowest:
            share = weight(halvings(logits[i], top, inverse_temperature))
            left -= share if share >= least else 0
            if left < 0:
                return i
    return -1  # cannot be: the blocks sum to mass
