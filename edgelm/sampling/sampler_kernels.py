"""Draws a token from one row of logits. Compiled by Numba, allocation-free.

Scratch memory comes from the caller, randomness is one number in [0, 1). Probabilities are 40-bit fixed-point
weights: integer sums do not depend on their order, so the compiler may vectorize them, and compiled and interpreted,
x86 and ARM runs agree to the last bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from edgelm.sampling.compiled import jit
from edgelm.sampling.ranking import SCAN_BLOCK, best_rank, gather_top_k, key_of, rank_of, sort, token_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelm.sampling.ranking import Bits, Keys

    Floats = NDArray[np.float32]

FIXED_POINT_ONE: Final = 2**40
"""The weight of the likeliest token."""
BINS: Final = 2048
"""Histogram bins of the top-p search: 32 to every halving of the probability, over 62 halvings."""

_LOG2_E: Final = 1.4426950408889634
_LN_2: Final = 0.6931471805599453
_LOWEST: Final = -62.0
_ALL: Final = np.iinfo(np.int64).min


def scratch_size(vocab_size: int) -> int:
    """Return how many int64 words `sample_all` needs as `scratch` for this vocabulary."""
    return max(BINS + 2 * SCAN_BLOCK, -(-vocab_size // SCAN_BLOCK))


@jit("float64(float32, float64, float64)")
def relative_log2(logit: np.float32, top: float, inverse_temperature: float) -> float:
    """Return log2 of a token's probability over the likeliest one's, clamped to [-62, 0]."""
    y = (np.float64(logit) - top) * inverse_temperature * _LOG2_E
    return y if y > _LOWEST else _LOWEST


@jit("int64(float64)")
def fixed_point_exp2(y: float) -> int:
    """Return 2**y in units of 2**-40, for y in [-62, 0]; 0 below about -41.

    Additions, multiplications and shifts alone, since the exp of libm differs between machines in its last bit. The
    Taylor series ends at degree 9: the relative error stays below 2**-28, that of the 29-bit mantissa.
    """
    n = np.int32(0.5 - y)
    t = (y + n) * _LN_2  # within [-0.35, 0.35]
    series = t * (1.0 / 362880.0) + (1.0 / 40320.0)
    series = series * t + (1.0 / 5040.0)
    series = series * t + (1.0 / 720.0)
    series = series * t + (1.0 / 120.0)
    series = series * t + (1.0 / 24.0)
    series = series * t + (1.0 / 6.0)
    series = series * t + 0.5
    series = series * t + 1.0
    series = series * t + 1.0
    return int((np.int64(np.int32(series * 2.0**29)) << np.int64(11)) >> np.int64(n))


@jit("int64(float32, int32, int64, float64, float64, int64, int64)")
def kept_weight(
    logit: np.float32,
    bits: np.int32,
    token: int,
    top: float,
    inverse_temperature: float,
    lowest: int,
    min_weight: int,
) -> int:
    """Return the weight of a token; 0 where its key is below `lowest` or its weight below `min_weight`."""
    share = fixed_point_exp2(relative_log2(logit, top, inverse_temperature))
    return share if (key_of(rank_of(bits), token) >= lowest and share >= min_weight) else 0


@jit("int64(float64, int64)")
def mass_limit(top_p: float, total: int) -> int:
    """Return the mass at which the nucleus is full: a token belongs to it while the mass above it is less."""
    if top_p >= 1.0:
        return total
    return min(max(math.ceil(top_p * total), 1), total)


@jit("int64(float32[::1], int32[::1], float64, float64, int64, float64, float64, float64, int64[::1])")
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
    """Draw from the k likeliest tokens, narrowed by top-p (of their mass) and min-p.

    Parameters
    ----------
    logits, bits, top, inverse_temperature, top_p, min_p, uniform
        As in `sample_all`.
    k
        In [1, V).
    keys
        int64 [min(2 k, V)], overwritten.
    """
    n = gather_top_k(bits, k, keys)
    sort(keys, n)
    total = 0
    for i in range(n):
        total += fixed_point_exp2(relative_log2(logits[token_of(keys[i])], top, inverse_temperature))
    limit = mass_limit(top_p, total)
    min_weight = math.ceil(min_p * FIXED_POINT_ONE)
    first = n
    mass = 0
    while first > 0 and mass < limit:
        share = fixed_point_exp2(relative_log2(logits[token_of(keys[first - 1])], top, inverse_temperature))
        if share < min_weight:
            break
        mass += share
        first -= 1
    for i in range(first, n):
        keys[i - first] = token_of(keys[i])
    n -= first
    sort(keys, n)
    left = min(np.int64(uniform * mass), mass - 1)
    for i in range(n - 1):
        left -= fixed_point_exp2(relative_log2(logits[keys[i]], top, inverse_temperature))
        if left < 0:
            return int(keys[i])
    return int(keys[n - 1])


@jit("int64(float32[::1], int32[::1], float64, float64, float64, int64[::1], int64[::1])")
def nucleus_key(
    logits: Floats,
    bits: Bits,
    top: float,
    inverse_temperature: float,
    top_p: float,
    keys: Keys,
    scratch: Keys,
) -> int:
    """Return the lowest key of the nucleus: the fewest likeliest tokens that hold `top_p` of the mass.

    A histogram of the mass over the halvings finds the bin where the nucleus ends; only that bin is sorted.

    Parameters
    ----------
    keys
        int64 [V], overwritten.
    scratch
        int64 [scratch_size(V)], overwritten.
    """
    masses = scratch[:BINS]
    bins = scratch[BINS : BINS + SCAN_BLOCK]
    shares = scratch[BINS + SCAN_BLOCK : BINS + 2 * SCAN_BLOCK]
    masses[:] = 0
    total = 0
    for start in range(0, logits.size, SCAN_BLOCK):
        block = logits[start : start + SCAN_BLOCK]
        for i in range(block.size):  # vectorized; the scatter below cannot be
            y = relative_log2(block[i], top, inverse_temperature)
            bins[i] = np.int64(np.int32(y * -32.0))
            shares[i] = fixed_point_exp2(y)
            total += shares[i]
        for i in range(block.size):
            masses[bins[i]] += shares[i]
    limit = mass_limit(top_p, total)
    last = 0
    mass = np.int64(0)
    while mass + masses[last] < limit:
        mass += masses[last]
        last += 1
    n = 0
    for start in range(0, logits.size, SCAN_BLOCK):
        block = logits[start : start + SCAN_BLOCK]
        found = 0
        for i in range(block.size):
            found += np.int32(relative_log2(block[i], top, inverse_temperature) * -32.0) == last
        if found == 0:
            continue
        for i in range(block.size):
            if np.int32(relative_log2(block[i], top, inverse_temperature) * -32.0) == last:
                keys[n] = key_of(rank_of(bits[start + i]), start + i)
                n += 1
    sort(keys, n)
    while mass < limit:
        n -= 1
        mass += fixed_point_exp2(relative_log2(logits[token_of(keys[n])], top, inverse_temperature))
    return int(keys[n])


@jit("int64(float32[::1], int32[::1], float64, float64, float64, float64, float64, int64[::1], int64[::1])")
def sample_all(
    logits: Floats,
    bits: Bits,
    top: float,
    inverse_temperature: float,
    top_p: float,
    min_p: float,
    uniform: float,
    keys: Keys,
    scratch: Keys,
) -> int:
    """Draw from the whole vocabulary, narrowed by top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024).

    The kept tokens are lined up by id, each as long as its weight; the one at `uniform` of the whole length is drawn.

    Parameters
    ----------
    logits, bits
        float32 [V] without NaN or +inf, and the same memory as int32 [V].
    top
        The largest logit, finite.
    inverse_temperature
        In (0, 1e30].
    top_p, min_p
        In [0, 1]; 1 and 0 are off. The likeliest token is always kept.
    uniform
        In [0, 1).
    keys
        int64 [V], overwritten.
    scratch
        int64 [scratch_size(V)], overwritten.
    """
    lowest = np.int64(_ALL)
    if top_p < 1.0:
        lowest = nucleus_key(logits, bits, top, inverse_temperature, top_p, keys, scratch)
    min_weight = math.ceil(min_p * FIXED_POINT_ONE)
    blocks = (logits.size + SCAN_BLOCK - 1) // SCAN_BLOCK
    masses = scratch[:blocks]
    mass = np.int64(0)
    for j in range(blocks):
        start = j * SCAN_BLOCK
        row, row_bits = logits[start : start + SCAN_BLOCK], bits[start : start + SCAN_BLOCK]
        part = np.int64(0)
        if top_p >= 1.0 or best_rank(row_bits) >= lowest >> 32:
            for i in range(row.size):
                part += kept_weight(row[i], row_bits[i], start + i, top, inverse_temperature, lowest, min_weight)
        masses[j] = part
        mass += part
    left = min(np.int64(uniform * mass), mass - 1)
    j = 0
    while left >= masses[j]:
        left -= masses[j]
        j += 1
    token = j * SCAN_BLOCK - 1
    while left >= 0:
        token += 1
        left -= kept_weight(logits[token], bits[token], token, top, inverse_temperature, lowest, min_weight)
    return token
