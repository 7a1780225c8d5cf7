"""Names and limits that the graph and kernels packages share."""

from __future__ import annotations

from typing import Final

DOMAIN: Final = "edgelm"
"""The domain of our operators."""

BATCH_INVARIANT_KEY: Final = "edgelm.invariant"
"""Metadata key of a batch-invariant graph: each token's results have the same bits in every batch. Set on the board."""

MAX_MATRIX_DIM: Final = 1 << 24
"""Maximum number of rows or columns of a matrix: many times the largest vocabulary."""
