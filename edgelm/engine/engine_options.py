"""Options with which an engine is loaded: defaults and ranges, stated once. Knows nothing of bundles or graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgelm.engine.fairness import NO_CLIENT_LIMITS, ClientLimits
from edgelm.errors import EdgelmError
from edgelm.runtime.memory_plan import PREFIX_CACHE_MB
from edgelm.runtime.threads import THREADS_LIMIT
from edgelm.system.board_cache import BoardCache

MAX_BATCH_LIMIT: Final = 1024
"""Upper bound of `max_batch`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a bundle is loaded. Raises `EdgelmError` for a value out of range."""

    threads: int | None = None
    """Threads of one operator, in [1, `THREADS_LIMIT`]; None is the number of cores, at most 4."""
    context: int | None = None
    """Tokens of one row of the KV cache, prompt and answer together; None is the bundle's context, the upper limit."""
    max_batch: int = 8
    """Requests decoded together, in [1, `MAX_BATCH_LIMIT`]."""
    prefix_cache_mb: int = PREFIX_CACHE_MB
    """Size of the prefix cache, in 10^6 bytes; 0 disables it."""
    speculation: bool = True
    """Whether draft tokens are proposed while that saves time."""
    board_cache: BoardCache | None = None
    """Where prepacked weights and compiled kernels are kept between runs; None keeps nothing."""
    memory_limit_mb: int | None = None
    """Maximum memory of the process, in 10^6 bytes, checked before anything is loaded; None is no limit."""
    spin: bool | None = None
    """Whether onnxruntime's idle threads spin; None is the measured or default setting."""
    client_limits: ClientLimits = NO_CLIENT_LIMITS
    """What one client may use of the engine."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_batch <= MAX_BATCH_LIMIT:
            raise EdgelmError(f"max_batch must lie in [1, {MAX_BATCH_LIMIT}], got {self.max_batch}")
        if self.threads is not None and not 1 <= self.threads <= THREADS_LIMIT:
            raise EdgelmError(f"threads must lie in [1, {THREADS_LIMIT}], got {self.threads}")
        if self.prefix_cache_mb < 0:
            raise EdgelmError(f"prefix_cache_mb must be at least 0, got {self.prefix_cache_mb}")

    @property
    def prefix_cache_bytes(self) -> int:
        """Size of the prefix cache in bytes."""
        return self.prefix_cache_mb * 1_000_000


DEFAULT_OPTIONS: Final = EngineOptions()
