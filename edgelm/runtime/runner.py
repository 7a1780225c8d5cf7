"""A runner: a bundle's graph with its inputs, outputs and KV cache bound once.

A runner computes logits for rows of the KV cache. It knows tokens and lengths, not requests or text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgelm.bundle.bundle_folder import Bundle
from edgelm.errors import EdgelmError
from edgelm.runtime.kv_cache import KVCache, KvSegment
from edgelm.runtime.ort import is_invariant, resolve_thread_settings, summarize_error
from edgelm.runtime.prepack import open_graph
from edgelm.system.board_cache import BoardCache

SHORT_PASS_TOKENS: Final = 32
"""Longest pass whose activations stay allocated. Those of 256 tokens take as much memory as the KV cache of 700."""

SHRINK_ARENA_OPTIONS: Final = ort.RunOptions()
"""Run options with which onnxruntime frees unused memory after the run."""
SHRINK_ARENA_OPTIONS.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]


class Runner(Protocol):
    """The interface between the engine and a graph. Rows of the KV cache are numbered from 0."""

    context: int
    """Positions of a row."""
    is_invariant: bool
    """Whether a token's keys, values and logits have the same bits in every pass and every batch."""
    long_from: int | None
    """Length above which a row must be computed again from its start, because the rotary tables change; None: never."""

    def prefill(
        self, row: int, tokens: Tokens, start: int, *, all_logits: bool = False, final_length: int | None = None
    ) -> Logits:
        """Compute prompt tokens at positions [start, start + n) of a row.

        tokens: int64 [n]. `final_length` is the length of the row after all calls of its prefill, if that is more than
        start + n. Returns the logits after the last token, float32 [1, V], or with `all_logits` those of all tokens,
        float32 [n, V]. The next call may overwrite the array.
        """

    def decode(self, tokens: Tokens, lengths: NDArray[np.int32]) -> Logits:
        """Compute one token of each of the rows 0 .. b-1.

        tokens: int64 [b]. lengths: int32 [b], positions already filled. Returns float32 [b, V]; the next call
        overwrites the array.
        """

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one row to the start of another."""

    def read_row(self, row: int, start: int, stop: int) -> KvSegment:
        """Return copies of positions [start, stop) of a row, [kv_heads, n, head_size] each."""

    def write_row(self, row: int, segments: Sequence[KvSegment]) -> None:
        """Write segments that `read_row` returned to the start of a row, one after the other."""

    def release_row(self, row: int) -> None:
        """Free the memory of a row; its content is lost."""

    def end_profile(self) -> Path:
        """Write the profile and return its file. Only for runners that were opened with `profile_prefix`."""


def open_runner(
    bundle: Bundle,
    *,
    rows: int,
    threads: int | None = None,
    spin: bool | None = None,
    context: int | None = None,
    cache: BoardCache | None = None,
    profile_prefix: Path | None = None,
) -> Runner:
    """Load a bundle's graph on the CPU.

    Parameters
    ----------
    bundle
        An opened bundle.
    rows
        Rows of the KV cache: the number of requests that can be computed at once.
    threads
        Threads of one operator, in [1, `THREADS_LIMIT`]; default: the number tuned on this board, else
        `default_threads()`.
    spin
        Whether idle threads spin instead of sleeping; default: the setting tuned on this board, else True.
    context
        Positions of a row, in [1, the bundle's context]; default: the bundle's context.
    cache
        Board cache for the packed weights; without it they are packed into private memory.
    profile_prefix
        Profile every run, which slows it, to a file whose path begins with this prefix.

    Raises
    ------
    BundleError
        onnxruntime cannot load the graph, or is older than the bundle needs.
    EdgelmError
        `threads` or `context` is out of range.
    """
    limit = bundle.manifest.context
    length = limit if context is None else context
    if not 1 <= length <= limit:
        raise EdgelmError(f"context must lie in [1, {limit}], the bundle's own limit; got {length}")
    tuning = resolve_thread_settings(bundle, threads, cache)
    if spin is not None:
        tuning = dataclasses.replace(tuning, spin=spin)
    graph = open_graph(bundle, tuning, cache, profile_prefix)
    if bundle.manifest.cache.kind == "growing":
        from edgelm.runtime.dynamic_runner import DynamicRunner

        return DynamicRunner(graph, bundle.manifest, rows, length)
    return BatchRunner(graph, bundle, rows, length)


class BatchRunner:
    """A graph whose past and present keys and values are the same buffers: no step copies them."""

    def __init__(self, graph: ort.InferenceSession, bundle: Bundle, rows: int, context: int) -> None:
        self.context = context
        self.is_invariant = is_invariant(graph)
        self._graph = graph
        self._vocab_size = bundle.manifest.vocab_size
        self._positions = _Positions(graph, bundle)
        self.long_from = self._positions.long_from
        self._kv = KVCache(bundle.manifest.cache, rows, context)
        self._decode_bindings: dict[int, _DecodeBinding] = {}
        self._logits = np.zeros((rows, self._vocab_size), np.float32)
        """Logits of a decode step; a batch of b uses the first b rows."""
        self._row_bindings: dict[int, ort.IOBinding] = {}
        """The binding of each single row, for prefill."""
        self._prefill_logits = np.zeros((1, self._vocab_size), np.float32)
        self._has_large_arena = False
        """Whether onnxruntime still holds the memory of a pass longer than `SHORT_PASS_TOKENS`."""

    def prefill(
        self, row: int, tokens: Tokens, start: int, *, all_logits: bool = False, final_length: int | None = None
    ) -> Logits:
        """See `Runner`."""
        count = len(tokens)
        logits = np.empty((count, self._vocab_size), np.float32) if all_logits else self._prefill_logits
        binding = self._row_bindings.get(row)
        if binding is None:
            binding = self._row_bindings[row] = self._bind(row, 1)
        inputs = {
            "input_ids": tokens.reshape(1, count),
            "seqlens_k": np.array([start + count - 1], np.int32),
            "total_sequence_length": np.array([start + count], np.int32),
            "rows": np.arange(count, dtype=np.int64) if all_logits else np.array([count - 1], np.int64),
        }
        if self._positions.has_positions_input:
            first = start + int(self._positions.offset(np.int64(max(start + count, final_length or 0))))
            inputs["positions"] = np.arange(first, first + count, dtype=np.int64).reshape(1, count)
        kept = [ort.OrtValue.ortvalue_from_numpy(array) for array in (*inputs.values(), logits)]
        for name, value in zip(inputs, kept, strict=False):
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output("logits", kept[-1])
        self._run(binding, count)
        return logits

    def decode(self, tokens: Tokens, lengths: NDArray[np.int32]) -> Logits:
        """See `Runner`."""
        batch = len(tokens)
        step = self._decode_bindings.get(batch)
        if step is None:
            step = self._decode_bindings[batch] = _DecodeBinding(
                self._bind(0, batch), self._logits[:batch], self._positions.has_positions_input
            )
        if self._positions.has_positions_input:
            step.positions[:, 0] = lengths + self._positions.offset(lengths + 1)
        step.tokens[:, 0] = tokens
        step.seqlens[:] = lengths
        step.total[0] = lengths.max() + 1
        self._run(step.binding, batch)
        return step.logits

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See `Runner`."""
        self._kv.copy_row(source, target, length)

    def read_row(self, row: int, start: int, stop: int) -> KvSegment:
        """See `Runner`."""
        return self._kv.read_row(row, start, stop)

    def write_row(self, row: int, segments: Sequence[KvSegment]) -> None:
        """See `Runner`."""
        start = 0
        for segment in segments:
            self._kv.write_row(row, start, segment)
            start += segment[0].shape[1]

    def release_row(self, row: int) -> None:
        """See `Runner`."""
        self._kv.release_row(row)

    def end_profile(self) -> Path:
        """See `Runner`."""
        return Path(self._graph.end_profiling())

    def _run(self, binding: ort.IOBinding, tokens: int) -> None:
        """Run the graph; the first short pass after a long one frees the memory of the long one."""
        is_long = tokens > SHORT_PASS_TOKENS
        try:
            self._graph.run_with_iobinding(
                binding, SHRINK_ARENA_OPTIONS if self._has_large_arena and not is_long else None
            )
        except Exception as error:  # onnxruntime raises types of its own, unrelated to each other
            raise EdgelmError(f"the graph cannot be computed: {summarize_error(error)}") from error
        self._has_large_arena = is_long

    def _bind(self, row: int, count: int) -> ort.IOBinding:
        """Return a binding with rows [row, row + count) of the KV cache as both past and present."""
        binding = self._graph.io_binding()
        for name, view in zip(self._kv.names, self._kv.row_views(row, count), strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(view)
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return binding


class _Positions:
    """Positions, as rows of the rotary tables, for graphs with a `positions` input.

    Long-context models have two tables, one behind the other: for sequences up to `long_from`, and for longer ones.
    """

    def __init__(self, graph: ort.InferenceSession, bundle: Bundle) -> None:
        self.has_positions_input = any(entry.name == "positions" for entry in graph.get_inputs())
        self.long_from = bundle.manifest.long_from
        self._rows = bundle.manifest.context

    def offset(self, lengths: np.integer[Any] | NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the first table row for sequences of these lengths, int64 of the same shape."""
        if self.long_from is None:
            return np.zeros_like(lengths, np.int64)
        return np.where(lengths > self.long_from, np.int64(self._rows), np.int64(0))


class _DecodeBinding:
    """Inputs and outputs of a decode step of one batch size, allocated and bound once."""

    def __init__(self, binding: ort.IOBinding, logits: Logits, positions: bool) -> None:
        batch = len(logits)
        self.binding = binding
        self.logits = logits
        self.tokens = np.zeros((batch, 1), np.int64)
        self.seqlens = np.zeros(batch, np.int32)
        self.total = np.zeros(1, np.int32)
        self.positions = np.zeros((batch, 1), np.int64)
        self._rows = np.arange(batch, dtype=np.int64)
        inputs = {
            "input_ids": self.tokens,
            "seqlens_k": self.seqlens,
            "total_sequence_length": self.total,
            "rows": self._rows,
        }
        if positions:
            inputs["positions"] = self.positions
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))
