"""Computes the memory that a bundle needs, before anything is loaded.

The parts are computed from the shapes in the manifest; only `PROGRAM_BYTES` is a measured constant. Pages of mapped
weights count too, although the system can drop them: without them every token waits for the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edgelm.bundle.manifest import Manifest, Matrix
from edgelm.errors import EdgelmError

PREFILL_CHUNK: Final = 256
"""Maximum number of prompt tokens in one pass: it bounds the time that running responses wait for a prompt."""

PREFIX_CACHE_MB: Final = 64
"""Default size of the prefix cache, in 10^6 bytes."""

PROGRAM_BYTES: Final = 85_000_000
"""Resident size of Python, NumPy, onnxruntime and the tokenizer (measured: 60 to 85 MB by version; Linux, x86-64)."""

FLOAT: Final = 4
MAX_DECODE_POSITIONS: Final = 9
"""Maximum number of positions in one decode pass of a sequence, draft tokens included."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each part if every request has the maximum length."""

    program: int
    weights: int
    """In the layout of onnxruntime's kernels: codes, and a float32 scale and sum for each block. Ours take less."""
    kv_cache: int
    static_prefix: int
    activations: int
    logits: int
    prefix_cache: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, name) for name in self.__slots__)

    def __str__(self) -> str:
        parts = (f"{name.replace('_', ' ')} {getattr(self, name) / 1e6:.1f}" for name in self.__slots__)
        return f"{' + '.join(parts)} = {self.total / 1e6:.1f} MB"


def plan_memory(manifest: Manifest, *, rows: int, context: int, prefix_cache_bytes: int) -> MemoryPlan:
    """Return the memory that a bundle needs for `rows` requests of `context` tokens and a prefix cache."""
    chunk = min(PREFILL_CHUNK, context)
    widest = max((matrix.rows for matrix in _projections(manifest)), default=0)
    inputs = max((matrix.columns for matrix in _projections(manifest)), default=0)
    return MemoryPlan(
        program=PROGRAM_BYTES,
        weights=sum(map(_packed_bytes, manifest.matrices)),
        kv_cache=rows * context * manifest.cache.bytes_per_token(),
        static_prefix=_prefix_bytes(manifest),
        # The widest output and its two halves; inputs of the next matrix and residuals.
        activations=FLOAT * chunk * (2 * widest + 4 * inputs),
        logits=FLOAT * manifest.vocab_size * (rows + MAX_DECODE_POSITIONS),
        prefix_cache=prefix_cache_bytes,
    )


def check_memory(
    manifest: Manifest, limit_mb: int | None, *, rows: int, context: int, prefix_cache_bytes: int
) -> MemoryPlan:
    """Return the plan. Raises `EdgelmError` with the numbers if it exceeds `limit_mb` * 10^6 bytes."""
    plan = plan_memory(manifest, rows=rows, context=context, prefix_cache_bytes=prefix_cache_bytes)
    if limit_mb is None or plan.total <= limit_mb * 1_000_000:
        return plan
    left = limit_mb * 1_000_000 - (plan.total - plan.kv_cache)
    fits = left // manifest.cache.bytes_per_token()
    if fits >= 2:  # one request needs a row to run in and one to be scored in
        advice = f"{fits} tokens of KV cache would fit, {rows} requests of {context} tokens were asked for: lower one"
    elif left + plan.prefix_cache > 0:
        advice = "use a smaller prefix cache, fewer requests or a shorter context"
    else:
        advice = "the model does not fit even without requests"
    raise EdgelmError(f"a memory limit of {limit_mb} MB is too small: {plan}; {advice}")


def _projections(manifest: Manifest) -> list[Matrix]:
    """Return the matrices inside the layers: those of vocabulary size are never multiplied with a whole chunk."""
    return [matrix for matrix in manifest.matrices if matrix.rows != manifest.vocab_size]


def _prefix_bytes(manifest: Manifest) -> int:
    return 0 if manifest.prefix is None else manifest.files[manifest.prefix.file].bytes


def _packed_bytes(matrix: Matrix) -> int:
    """Return the bytes of a matrix after packing; onnxruntime stores codes of 5 and 6 bits in 8."""
    if matrix.block_size is None:
        return matrix.rows * matrix.columns * matrix.bits // 8
    blocks = matrix.rows * -(-matrix.columns // matrix.block_size)
    bits = 8 if matrix.bits in (5, 6) else matrix.bits
    return blocks * (matrix.block_size * bits // 8 + 2 * FLOAT)
