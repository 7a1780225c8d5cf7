"""A runner for graphs that return a longer copy of their keys and values at each step, as `--via optimum` exports them.

It costs more than `BatchRunner`: each step copies the whole past of its row inside the graph, and during a step a row's
keys and values exist twice. Rows are decoded one after the other: four requests take four times as long as one, and the
logits of a row never depend on other rows. Knows tokens and lengths, not requests or text, and uses onnxruntime only
through the graph that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.manifest import Manifest
from edgelm.errors import EdgelmError
from edgelm.runtime.kv_cache import KvSegment

CACHE: Final = ("key", "value")


class Value(Protocol):
    """A tensor that onnxruntime owns."""

    def numpy(self) -> NDArray[np.float32]:
        """Return it as an array."""

    def shape(self) -> Sequence[int]:
        """Return its dimensions."""


class Argument(Protocol):
    """An input of a graph."""

    name: str


class Binding(Protocol):
    """Inputs and outputs of one run."""

    def bind_cpu_input(self, name: str, arr_on_cpu: NDArray[np.float32] | NDArray[np.int64]) -> None:
        """Bind an array as an input. It must outlive the run."""

    def bind_ortvalue_input(self, name: str, ortvalue: Value) -> None:
        """Bind a tensor that an earlier run returned as an input."""

    def bind_output(self, name: str) -> None:
        """Bind an output to memory that onnxruntime allocates."""

    def get_outputs(self) -> Sequence[Value]:
        """Return the outputs in the order they were bound."""


class Graph(Protocol):
    """A loaded graph."""

    def get_inputs(self) -> Sequence[Argument]:
        """Return the inputs of the graph."""

    def io_binding(self) -> Binding:
        """Return an empty binding."""

    def run_with_iobinding(self, iobinding: Binding) -> None:
        """Compute the outputs."""

    def end_profiling(self) -> str:
        """Write the profile and return its file."""


@dataclass(slots=True)
class _Row:
    """Keys and values of one row, [1, kv_heads, length, head_size] each. Never changed in place, only replaced."""

    length: int
    values: Sequence[Value | NDArray[np.float32]]


class DynamicRunner:
    """Implements `edgelm.runtime.runner.Runner` with separate keys and values for each row, which grow with it.

    A graph with the input `rows` computes logits only for the requested positions, one without it for all.
    """

    def __init__(self, graph: Graph, manifest: Manifest, rows: int, context: int) -> None:
        self.context = context
        self.is_invariant = False
        self.long_from: int | None = None
        cache = manifest.cache
        self._graph = graph
        self._inputs = {argument.name for argument in graph.get_inputs()}
        self._names = [f"{i}.{part}" for i in range(cache.layers) for part in CACHE]
        self._empty = np.zeros((1, cache.kv_heads, 0, cache.head_size), np.float32)
        self._rows = [self._blank() for _ in range(rows)]
        self._logits = np.zeros((rows, manifest.vocab_size), np.float32)

    def prefill(
        self,
        row: int,
        tokens: NDArray[np.int64],
        start: int,
        *,
        all_logits: bool = False,
        final_length: int | None = None,
    ) -> NDArray[np.float32]:
        """See `Runner`. Positions do not depend on `final_length` here."""
        del final_length
        logits = self._run(row, tokens, start, all_logits=all_logits)
        if all_logits:
            return logits
        self._logits[0] = logits[-1]
        return self._logits[:1]

    def decode(self, tokens: NDArray[np.int64], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """See `Runner`. Runs the graph once for each row."""
        batch = len(tokens)
        for row in range(batch):
            self._logits[row] = self._run(row, tokens[row : row + 1], int(lengths[row]), all_logits=False)[-1]
        return self._logits[:batch]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """See `Runner`. Nothing is copied: both rows refer to the same tensors until their next step."""
        self._rows[target] = self._cut(self._rows[source], length)

    def read_row(self, row: int, start: int, stop: int) -> KvSegment:
        """See `Session`."""
        return [array[0, :, start:stop].copy() for array in _arrays(self._rows[row])]

    def write_row(self, row: int, segments: Sequence[KvSegment]) -> None:
        """See `Session`."""
        whole = [np.concatenate(parts, axis=1)[None] for parts in zip(*segments, strict=True)]
        self._rows[row] = _Row(whole[0].shape[2], whole)

    def release_row(self, row: int) -> None:
        """See `Session`."""
        self._rows[row] = self._blank()

    def end_profile(self) -> Path:
        """See `Session`."""
        return Path(self._graph.end_profiling())

    def _run(self, row: int, tokens: NDArray[np.int64], start: int, *, all_logits: bool) -> NDArray[np.float32]:
        """Compute tokens, int64 [n], at positions [start, start + n) and replace the row's keys and values.

        Returns logits, float32 [r, V]: r is 1 or, with `all_logits` or a graph without the input `rows`, n.
        """
        count = len(tokens)
        past = self._cut(self._rows[row], start)
        offered = {
            "input_ids": np.ascontiguousarray(tokens.reshape(1, count)),
            "attention_mask": np.ones((1, start + count), np.int64),
            "position_ids": np.arange(start, start + count, dtype=np.int64).reshape(1, count),
            "rows": np.arange(0 if all_logits else count - 1, count, dtype=np.int64),
        }
        binding = self._graph.io_binding()
        for name in self._inputs & offered.keys():
            binding.bind_cpu_input(name, offered[name])
        for name, value in zip(self._names, past.values, strict=True):
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(f"past_key_values.{name}", value)
            else:
                binding.bind_ortvalue_input(f"past_key_values.{name}", value)
        for name in ("logits", *(f"present.{name}" for name in self._names)):
            binding.bind_output(name)
        try:
            self._graph.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime raises types of its own, unrelated to each other
            raise EdgelmError(
                f"the graph cannot be computed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from error
        logits, *present = binding.get_outputs()
        self._check(present, start + count)
        self._rows[row] = _Row(start + count, present)
        flat = logits.numpy()
        if flat.shape[-1:] != self._logits.shape[1:]:
            raise EdgelmError(
                f"the graph returns logits of shape {list(flat.shape)}, expected {self._logits.shape[1]} per token"
            )
        return flat.reshape(-1, flat.shape[-1])

    def _check(self, present: Sequence[Value], length: int) -> None:
        """Raise `EdgelmError` if keys and values do not have the shape of `length` positions."""
        expected = (1, self._empty.shape[1], length, self._empty.shape[3])
        for value in present:
            if tuple(value.shape()) != expected:
                raise EdgelmError(
                    f"the graph returns keys or values of shape {list(value.shape())}, expected {list(expected)}"
                )

    def _blank(self) -> _Row:
        return _Row(0, [self._empty] * len(self._names))

    def _cut(self, row: _Row, length: int) -> _Row:
        """Return a row's first `length` positions."""
        if length == row.length:
            return row
        if length == 0:
            return self._blank()
        if length > row.length:
            raise AssertionError(f"cannot cut a row of {row.length} positions to {length}")
        return _Row(length, [np.ascontiguousarray(array[:, :, :length]) for array in _arrays(row)])


def _arrays(row: _Row) -> list[NDArray[np.float32]]:
    """Return keys and values of a row, [1, kv_heads, length, head_size] each."""
    return [value if isinstance(value, np.ndarray) else value.numpy() for value in row.values]
