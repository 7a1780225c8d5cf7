"""The rows of an embedding and of a head that a pruned vocabulary kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import TensorSource


@dataclass(frozen=True, slots=True)
class PrunedWeights:
    """A checkpoint's weights with fewer rows in some tensors: a `TensorSource` like the checkpoint itself.

    Parameters
    ----------
    source
        Where the weights come from.
    kept
        int64 [new vocabulary]: the old row of each new one, such as `PrunedVocabulary.kept`.
    rows
        How many there were: the checkpoint's vocab_size.
    names
        The tensors with a row for each token.
    chunk
        Kept rows gathered at once, so that the whole matrix is never in memory beside them.
    """

    source: TensorSource
    kept: NDArray[np.int64]
    rows: int
    names: Collection[str]
    chunk: int = 1024

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> NDArray[np.float32]:
        """Return one tensor as float32 [*shape], or some of its rows (step 1). Raises as `Checkpoint.tensor` does.

        The first of `shape` is the new vocabulary for the tensors of `names`, and `rows` counts in it.
        """
        if name not in self.names:
            return self.source.tensor(name, shape, rows)
        old = self.kept if rows is None else self.kept[rows]
        values = np.empty((len(old), *shape[1:]), np.float32)
        for start in range(0, len(old), self.chunk):
            wanted = old[start : start + self.chunk]
            first, last = int(wanted.min()), int(wanted.max())
            part = self.source.tensor(name, (self.rows, *shape[1:]), slice(first, last + 1))
            values[start : start + self.chunk] = part[wanted - first]
        return values
