"""The rows of embedding and head that a pruned vocabulary kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import TensorSource


@dataclass(frozen=True, slots=True)
class PrunedWeights:
    """A checkpoint's weights with fewer rows in some tensors; a `TensorSource` like the checkpoint itself.

    Parameters
    ----------
    source
        The unpruned weights.
    kept_ids
        int64 [new vocabulary]: the old row of each new row, such as `PrunedVocabulary.kept_ids`.
    rows
        Number of old rows: the checkpoint's vocab_size.
    names
        The tensors with one row for each token.
    chunk
        Kept rows gathered at a time, so that the old matrix is never in memory as a whole.
    """

    source: TensorSource
    kept_ids: NDArray[np.int64]
    rows: int
    names: Collection[str]
    chunk: int = 1024

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> NDArray[np.float32]:
        """Return one tensor as float32 [*shape], or some of its rows (step 1). Raises as `Checkpoint.tensor` does.

        For the tensors in `names`, the first number of `shape` and `rows` refer to the new vocabulary.
        """
        if name not in self.names:
            return self.source.tensor(name, shape, rows)
        old = self.kept_ids if rows is None else self.kept_ids[rows]
        values = np.empty((len(old), *shape[1:]), np.float32)
        for start in range(0, len(old), self.chunk):
            wanted = old[start : start + self.chunk]
            first, last = int(wanted.min()), int(wanted.max())
            part = self.source.tensor(name, (self.rows, *shape[1:]), slice(first, last + 1))
            values[start : start + self.chunk] = part[wanted - first]
        return values
