"""The chain that turns one row of logits into one token: mask, penalty, temperature, top-k, top-p, min-p, draw.

Owns the scratch memory and the random state of one request. Knows nothing of models, batches or text.
"""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgelm.errors import RequestError
from edgelm.types import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray

MAX_VOCAB_SIZE: Final = 2**22
"""Weights are at most 2**40 each, so that a sum of this many still fits a signed 64-bit integer."""

_NO_HISTORY: Final = np.empty(0, dtype=np.int32)


class Sampler:
    """Chooses the tokens of one request. Not thread-safe: one request, one sampler.

    The order is that of transformers: grammar mask, repetition penalty, temperature, top-k, top-p, min-p. Equal
    logits rank by token id, the lowest first, so top-k keeps exactly k tokens and greedy takes the lowest id.
    The same seed gives the same tokens on every machine: weights are integers made by basic IEEE arithmetic (see
    `kernels.weight`), and the generator is PCG64 (O'Neill 2014, "PCG: A Family of Simple Fast Space-Efficient
    Statistically Good Algorithms for Random Number Generation"), whose stream numpy keeps stable (NEP 19).

    Parameters
    ----------
    params
        How to choose. A `seed` of None takes 128 bits from the operating system.
    vocab_size
        Width V of the logits, in [1, 2**22].

    Raises
    ------
    RequestError
        With code "internal" when `vocab_size` is out of range.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
            raise RequestError("internal", f"vocab_size must lie in [1, {MAX_VOCAB_SIZE}], got {vocab_size}")
        self.params = params
        self.vocab_size = vocab_size
        self._greedy = params.temperature == 0.0
        self._penalizes = params.repetition_penalty != 1.0
        self._kernels: tuple[ModuleType, ModuleType] | None = None
        if not needs_kernels(params):
            return
        self._kernels = _kernels()
        self._seen = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        if self._greedy:
            return
        seed = int.from_bytes(os.urandom(16), "little") if params.seed is None else params.seed
        self._random = np.random.PCG64(seed)
        self._top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        # A temperature of 1e-300 would overflow here; beyond 1e30 nothing but the maximum has any weight.
        self._inverse_temperature = min(1.0 / max(params.temperature, 1e-300), 1e30)
        self._keys = np.empty(min(2 * self._top_k, vocab_size) or vocab_size, dtype=np.int64)
        self._scratch = np.empty(self._kernels[1].scratch_size(vocab_size), dtype=np.int64)

    def sample(
        self,
        logits: NDArray[np.float32],
        mask: NDArray[np.uint32] | None = None,
        history: NDArray[np.int32] | None = None,
    ) -> int:
        """Choose one token.

        Parameters
        ----------
        logits
            float32 [V], contiguous. May be changed in place: keep a copy for `logprobs`.
        mask
            uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 says whether token i is allowed. None allows all.
        history
            int32 [n]: the tokens the repetition penalty applies to, each once however often it occurs. Ids outside
            [0, V) are ignored.

        Raises
        ------
        RequestError
            With code "internal" when the logits hold NaN or +inf, or when every token is masked.
        """
        if self._kernels is None:
            return _pick_greedy(logits, mask)
        penalties, kernels = self._kernels
        if mask is not None:
            penalties.mask_logits(logits, mask)
        if self._penalizes:
            past = _NO_HISTORY if history is None else np.ascontiguousarray(history, dtype=np.int32)
            penalties.penalize(logits, past, self._seen, np.float32(self.params.repetition_penalty))
        if self._greedy:
            return _pick_greedy(logits, None)
        return self._draw(kernels, logits)

    def logprobs(self, logits: NDArray[np.float32], token: int) -> TokenLogprob:
        """Return the log-probability of `token`, and the `params.logprobs` likeliest tokens, under raw logits.

        Parameters
        ----------
        logits
            float32 [V], as the model gave them; not changed.
        token
            In [0, V).
        """
        top = _check(float(logits.max()))
        norm = top + math.log(np.exp(logits - np.float32(top)).sum(dtype=np.float64))
        left = logits.copy()
        likeliest = []
        for _ in range(min(self.params.logprobs, left.size)):
            best = int(left.argmax())
            if left[best] == -np.inf:  # fewer tokens are possible than were asked for
                break
            likeliest.append((best, float(logits[best]) - norm))
            left[best] = -np.inf
        return TokenLogprob(token, float(logits[token]) - norm, tuple(likeliest))

    def _draw(self, kernels: ModuleType, logits: NDArray[np.float32]) -> int:
        top = _check(float(logits.max()))
        uniform = (self._random.random_raw() >> 11) * 2.0**-53  # [0, 1)
        arguments: tuple[Any, ...] = (logits, logits.view(np.int32), top, self._inverse_temperature)
        filters = (self.params.top_p, self.params.min_p, uniform, self._keys)
        if self._top_k:
            return int(kernels.sample_top_k(*arguments, self._top_k, *filters))
        return int(kernels.sample_all(*arguments, *filters, self._scratch))


def load_kernels() -> None:
    """Load the kernels now: about 0.4 s from Numba's cache, several seconds where they must be compiled first.

    A service calls this before it answers its first request.
    """
    _kernels()


def needs_kernels(params: SamplingParams) -> bool:
    """Whether a request that samples so needs the compiled kernels."""
    return params.temperature != 0.0 or params.repetition_penalty != 1.0


def are_kernels_loaded() -> bool:
    """Whether the kernels are in this process, so that a request which needs them does not wait."""
    return all(f"edgelm.sampling.{name}" in sys.modules for name in ("penalties", "sampler_kernels"))


def _kernels() -> tuple[ModuleType, ModuleType]:
    from edgelm.sampling import penalties, sampler_kernels  # these import numba

    return penalties, sampler_kernels


def _pick_greedy(logits: NDArray[np.float32], mask: NDArray[np.uint32] | None) -> int:
    """Return the token of the largest allowed logit, the lowest id among equals, with numpy alone."""
    token = int(logits.argmax())
    if mask is not None and not (int(mask[token >> 5]) >> (token & 31)) & 1:
        bits = np.unpackbits(mask.view(np.uint8), count=logits.size, bitorder="little")
        allowed = np.flatnonzero(bits.view(np.bool_))
        if allowed.size == 0:
            _check(-math.inf)
        token = int(allowed[logits[allowed].argmax()])
    _check(float(logits[token]))
    return token


def _check(top: float) -> float:
    """Return the largest logit, or say why there is nothing to choose."""
    if math.isfinite(top):
        return top
    if top == -math.inf:
        raise RequestError("internal", "no token can be chosen: the grammar or the model rules out all of them")
    raise RequestError("internal", f"the model's logits hold {top}: its weights or its graph are damaged")
