"""The sampler: turns one row of logits into one token by mask, logit steps, temperature, top-k, top-p, min-p, draw.

Owns the scratch memory and the random state of one request. Knows nothing of models, batches or text.

To add a sampling method that changes logits before the draw: write one module in `steps/`, and declare its field in
`SamplingParams` (default, range and help, from which MQTT keys and command-line flags are derived).
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import RequestError
from edgelm.sampling import steps
from edgelm.types import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from types import ModuleType

MAX_VOCAB_SIZE: Final = 2**22
"""Weights are at most 2**40 each, so a sum of this many fits a signed 64-bit integer."""

LogitStep = Callable[[NDArray[np.float32], NDArray[np.int32]], None]
"""Changes logits, float32 [V], in place; the second argument is the history, int32 [n], contiguous."""

_FOUND: Final = frozenset(module.name for module in iter_modules(steps.__path__))
LOGIT_STEPS: Final = tuple(field.name for field in dataclasses.fields(SamplingParams) if field.name in _FOUND)
"""Steps between mask and temperature: the modules of `steps/`, in the order of the fields of `SamplingParams`."""

_PACKAGE: Final = __name__.rpartition(".")[0]
_KERNEL_MODULES: Final = tuple(
    f"{_PACKAGE}.{name}" for name in ("token_mask", "sampler_kernels", *(f"steps.{name}" for name in LOGIT_STEPS))
)
_DEFAULTS: Final = SamplingParams()
_NO_HISTORY: Final = np.empty(0, dtype=np.int32)


class Sampler:
    """Chooses the tokens of one request. Not thread-safe: each request has its own sampler.

    The order is that of transformers: token mask, repetition penalty, temperature, top-k, top-p, min-p. Equal logits
    rank by token id, the lowest first: top-k keeps exactly k tokens, and greedy decoding takes the lowest id.
    The same seed gives the same tokens on every machine: weights are integers computed by basic IEEE arithmetic (see
    `sampler_kernels.fixed_point_exp2`), and the generator is PCG64 (O'Neill 2014, "PCG: A Family of Simple Fast
    Space-Efficient Statistically Good Algorithms for Random Number Generation"), whose stream numpy keeps stable
    (NEP 19).

    Parameters
    ----------
    params
        Sampling parameters. If `seed` is None, the operating system provides 128 random bits.
    vocab_size
        Width V of the logits, in [1, 2**22].

    Raises
    ------
    RequestError
        With code "internal" if `vocab_size` is out of range.
    """

    def __init__(self, params: SamplingParams, vocab_size: int) -> None:
        if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
            raise RequestError("internal", f"vocab_size must lie in [1, {MAX_VOCAB_SIZE}], got {vocab_size}")
        self.params = params
        self.vocab_size = vocab_size
        self._is_greedy = params.temperature == 0.0
        self._kernels: tuple[ModuleType, ModuleType] | None = None
        if not needs_kernels(params):
            return
        self._kernels = _load_kernels()
        self._steps = [_make_step(name, params, vocab_size) for name in _active_steps(params)]
        if self._is_greedy:
            return
        seed = int.from_bytes(os.urandom(16), "little") if params.seed is None else params.seed
        self._random = np.random.PCG64(seed)
        self._top_k = params.top_k if 0 < params.top_k < vocab_size else 0
        # 1 / 1e-300 would overflow; above 1e30 only the largest logit has any weight.
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
            float32 [V], contiguous. May be changed in place: `logprobs` needs a copy from before.
        mask
            uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 is 1 if token i is allowed. None allows all.
        history
            int32 [n]: the tokens of the sequence so far. Ids outside [0, V) are ignored.

        Raises
        ------
        RequestError
            With code "internal" if the logits contain NaN or +inf, or if every token is masked.
        """
        if self._kernels is None:
            return _choose_greedy(logits, mask)
        token_mask, sampler_kernels = self._kernels
        if mask is not None:
            token_mask.mask_logits(logits, mask)
        if self._steps:
            past = _NO_HISTORY if history is None else np.ascontiguousarray(history, dtype=np.int32)
            for step in self._steps:
                step(logits, past)
        if self._is_greedy:
            return _choose_greedy(logits, None)
        return self._draw(sampler_kernels, logits)

    def logprobs(self, logits: NDArray[np.float32], token: int) -> TokenLogprob:
        """Return the log-probability of `token`, and the `params.logprobs` likeliest tokens, under the raw logits.

        Parameters
        ----------
        logits
            float32 [V], as the model returned them; not changed.
        token
            In [0, V).
        """
        max_logit = _check_max_logit(float(logits.max()))
        norm = max_logit + math.log(np.exp(logits - np.float32(max_logit)).sum(dtype=np.float64))
        remaining = logits.copy()
        likeliest = []
        for _ in range(min(self.params.logprobs, remaining.size)):
            best = int(remaining.argmax())
            if remaining[best] == -np.inf:  # the model allows fewer tokens than requested
                break
            likeliest.append((best, float(logits[best]) - norm))
            remaining[best] = -np.inf
        return TokenLogprob(token, float(logits[token]) - norm, tuple(likeliest))

    def _draw(self, sampler_kernels: ModuleType, logits: NDArray[np.float32]) -> int:
        max_logit = _check_max_logit(float(logits.max()))
        uniform = (self._random.random_raw() >> 11) * 2.0**-53  # in [0, 1)
        arguments: tuple[Any, ...] = (logits, logits.view(np.int32), max_logit, self._inverse_temperature)
        filters = (self.params.top_p, self.params.min_p, uniform, self._keys)
        if self._top_k:
            return int(sampler_kernels.sample_top_k(*arguments, self._top_k, *filters))
        return int(sampler_kernels.sample_all(*arguments, *filters, self._scratch))


def load_kernels() -> None:
    """Load the kernels: about 0.4 s from Numba's cache, several seconds if they must be compiled first.

    May be called again. A service calls it before its first request.
    """
    _load_kernels()


def needs_kernels(params: SamplingParams) -> bool:
    """Return whether a request with these parameters needs the compiled kernels."""
    return params.temperature != 0.0 or bool(_active_steps(params))


def are_kernels_loaded() -> bool:
    """Return whether the kernels are loaded in this process, so that a request does not wait for them."""
    return all(name in sys.modules for name in _KERNEL_MODULES)


def _load_kernels() -> tuple[ModuleType, ModuleType]:
    """Import every module that imports Numba; return `token_mask` and `sampler_kernels`."""
    token_mask, sampler_kernels, *_ = map(import_module, _KERNEL_MODULES)
    return token_mask, sampler_kernels


def _active_steps(params: SamplingParams) -> list[str]:
    """Return the names of the logit steps that a request uses, in order."""
    return [name for name in LOGIT_STEPS if getattr(params, name) != getattr(_DEFAULTS, name)]


def _make_step(name: str, params: SamplingParams, vocab_size: int) -> LogitStep:
    step: LogitStep = import_module(f"{steps.__name__}.{name}").make_step(params, vocab_size)
    return step


def _choose_greedy(logits: NDArray[np.float32], mask: NDArray[np.uint32] | None) -> int:
    """Return the token with the largest allowed logit, the lowest id among equals. Needs only numpy."""
    token = int(logits.argmax())
    if mask is not None and not (int(mask[token >> 5]) >> (token & 31)) & 1:
        bits = np.unpackbits(mask.view(np.uint8), count=logits.size, bitorder="little")
        allowed = np.flatnonzero(bits.view(np.bool_))
        if allowed.size == 0:
            _check_max_logit(-math.inf)
        token = int(allowed[logits[allowed].argmax()])
    _check_max_logit(float(logits[token]))
    return token


def _check_max_logit(max_logit: float) -> float:
    """Return the largest logit. Raises `RequestError` if it is not finite."""
    if math.isfinite(max_logit):
        return max_logit
    if max_logit == -math.inf:
        raise RequestError("internal", "no token can be chosen: the constraint or the model rules out all of them")
    raise RequestError("internal", f"the model's logits hold {max_logit}: its weights or its graph are damaged")
