"""Draws a token from one row of logits. Compiled by Numba, allocation-free.

Scratch memory comes from the caller; randomness is one number in [0, 1). Probabilities are 40-bit fixed-point weights:
integer sums do not depend on their order, so the compiler may vectorize them, and compiled and interpreted code on x86
and ARM agree to the last bit.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from edgelm.sampling.kernel_compiler import jit
from edgelm.sampling.ranking import SCAN_BLOCK, best_rank, gather_top_k, key_of, rank_of, sort, token_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgelm.sampling.ranking import Bits, Keys

    Floats = NDArray[np.float32]

FIXED_POINT_ONE: Final = 2**40
"""Weight of the likeliest token."""
BINS: Final = 2048
"""Histogram bins of the top-p search: 32 for each halving of the probability, over 62 halvings."""

_LOG2_E: Final = 1.4426950408889634
_LN_2: Final = 0.6931471805599453
_MIN_LOG2: Final = -62.0
_NO_MIN_KEY: Final = np.iinfo(np.int64).min


def scratch_size(vocab_size: int) -> int:
    """Return the size of `scratch` that `sample_all` needs for this vocabulary, in int64 words."""
    return max(BINS + 2 * SCAN_BLOCK, -(-vocab_size // SCAN_BLOCK))


@jit("float64(float32, float64, float64)")
def relative_log2(logit: np.float32, max_logit: float, inverse_temperature: float) -> float:
    """Return log2 of a token's probability divided by the largest probability, clamped to [-62, 0]."""
    y = (np.float64(logit) - max_logit) * inverse_temperature * _LOG2_E
    return y if y > _MIN_LOG2 else _MIN_LOG2


@jit("int64(float64)")
def fixed_point_exp2(y: float) -> int:
    """Return 2**y in units of 2**-40, for y in [-62, 0]; 0 below about -41.

    Uses only additions, multiplications and shifts, because exp of libm differs between machines in its last bit. The
    Taylor series ends at degree 9: the relative error is below 2**-28, that of the 29-bit mantissa.
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
    max_logit: float,
    inverse_temperature: float,
    min_key: int,
    min_weight: int,
) -> int:
    """Return the weight of a token; 0 if its key is below `min_key` or its weight is below `min_weight`."""
    weight = fixed_point_exp2(relative_log2(logit, max_logit, inverse_temperature))
    return weight if (key_of(rank_of(bits), token) >= min_key and weight >= min_weight) else 0


@jit("int64(float64, int64)")
def mass_limit(top_p: float, total: int) -> int:
    """Return the mass of the nucleus: a token belongs to it if all likelier tokens together have less."""
    if top_p >= 1.0:
        return total
    return min(max(math.ceil(top_p * total), 1), total)


@jit("int64(float32[::1], int32[::1], float64, float64, int64, float64, float64, float64, int64[::1])")
def sample_top_k(
    logits: Floats,
    bits: Bits,
    max_logit: float,
    inverse_temperature: float,
    k: int,
    top_p: float,
    min_p: float,
    uniform: float,
    keys: Keys,
) -> int:
    """Draw from the k likeliest tokens, restricted by top-p (of their mass) and min-p.

    Parameters
    ----------
    logits, bits, max_logit, inverse_temperature, top_p, min_p, uniform
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
        total += fixed_point_exp2(relative_log2(logits[token_of(keys[i])], max_logit, inverse_temperature))
    limit = mass_limit(top_p, total)
    min_weight = math.ceil(min_p * FIXED_POINT_ONE)
    first = n
    mass = 0
    while first > 0 and mass < limit:
        weight = fixed_point_exp2(relative_log2(logits[token_of(keys[first - 1])], max_logit, inverse_temperature))
        if weight < min_weight:
            break
        mass += weight
        first -= 1
    for i in range(first, n):
        keys[i - first] = token_of(keys[i])
    n -= first
    sort(keys, n)
    remaining = min(np.int64(uniform * mass), mass - 1)
    for i in range(n - 1):
        remaining -= fixed_point_exp2(relative_log2(logits[keys[i]], max_logit, inverse_temperature))
        if remaining < 0:
            return int(keys[i])
    return int(keys[n - 1])


@jit("int64(float32[::1], int32[::1], float64, float64, float64, int64[::1], int64[::1])")
def nucleus_key(
    logits: Floats,
    bits: Bits,
    max_logit: float,
    inverse_temperature: float,
    top_p: float,
    keys: Keys,
    scratch: Keys,
) -> int:
    """Return the lowest key of the nucleus: the smallest set of likeliest tokens with `top_p` of the mass.

    A histogram of the mass over log2 of the probability finds the bin where the nucleus ends; only that bin is sorted.

    Parameters
    ----------
    keys
        int64 [V], overwritten.
    scratch
        int64 [scratch_size(V)], overwritten.
    """
    masses = scratch[:BINS]
    bins = scratch[BINS : BINS + SCAN_BLOCK]
    weights = scratch[BINS + SCAN_BLOCK : BINS + 2 * SCAN_BLOCK]
    masses[:] = 0
    total = 0
    for start in range(0, logits.size, SCAN_BLOCK):
        block = logits[start : start + SCAN_BLOCK]
        for i in range(block.size):  # vectorized; the scatter below is not
            y = relative_log2(block[i], max_logit, inverse_temperature)
            bins[i] = np.int64(np.int32(y * -32.0))
            weights[i] = fixed_point_exp2(y)
            total += weights[i]
        for i in range(block.size):
            masses[bins[i]] += weights[i]
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
            found += np.int32(relative_log2(block[i], max_logit, inverse_temperature) * -32.0) == last
        if found == 0:
            continue
        for i in range(block.size):
            if np.int32(relative_log2(block[i], max_logit, inverse_temperature) * -32.0) == last:
                keys[n] = key_of(rank_of(bits[start + i]), start + i)
                n += 1
    sort(keys, n)
    while mass < limit:
        n -= 1
        mass += fixed_point_exp2(relative_log2(logits[token_of(keys[n])], max_logit, inverse_temperature))
    return int(keys[n])


@jit("int64(float32[::1], int32[::1], float64, float64, float64, float64, float64, int64[::1], int64[::1])")
def sample_all(
    logits: Floats,
    bits: Bits,
    max_logit: float,
    inverse_temperature: float,
    top_p: float,
    min_p: float,
    uniform: float,
    keys: Keys,
    scratch: Keys,
) -> int:
    """Draw from the whole vocabulary, restricted by top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024).

    Inverse transform sampling over the kept tokens in order of their ids: the token at `uniform` of the total weight.

    Parameters
    ----------
    logits, bits
        float32 [V] without NaN or +inf, and the same memory as int32 [V].
    max_logit
        The largest logit, finite.
    inverse_temperature
        In (0, 1e30].
    top_p, min_p
        In [0, 1]; 1 and 0 switch them off. The likeliest token is always kept.
    uniform
        In [0, 1).
    keys
        int64 [V], overwritten.
    scratch
        int64 [scratch_size(V)], overwritten.
    """
    min_key = np.int64(_NO_MIN_KEY)
    if top_p < 1.0:
        min_key = nucleus_key(logits, bits, max_logit, inverse_temperature, top_p, keys, scratch)
    min_weight = math.ceil(min_p * FIXED_POINT_ONE)
    blocks = (logits.size + SCAN_BLOCK - 1) // SCAN_BLOCK
    masses = scratch[:blocks]
    mass = np.int64(0)
    for j in range(blocks):
        start = j * SCAN_BLOCK
        row, row_bits = logits[start : start + SCAN_BLOCK], bits[start : start + SCAN_BLOCK]
        part = np.int64(0)
        if top_p >= 1.0 or best_rank(row_bits) >= min_key >> 32:
            for i in range(row.size):
                part += kept_weight(row[i], row_bits[i], start + i, max_logit, inverse_temperature, min_key, min_weight)
        masses[j] = part
        mass += part
    remaining = min(np.int64(uniform * mass), mass - 1)
    j = 0
    while remaining >= masses[j]:
        remaining -= masses[j]
        j += 1
    token = j * SCAN_BLOCK - 1
    while remaining >= 0:
        token += 1
        remaining -= kept_weight(logits[token], bits[token], token, max_logit, inverse_temperature, min_key, min_weight)
    return token
