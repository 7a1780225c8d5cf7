"""Names and limits that graphs and kernels share."""

from __future__ import annotations

from typing import Final

DOMAIN: Final = "edgelm"
"""The operators' domain."""

BATCH_INVARIANT_KEY: Final = "edgelm.invariant"
"""Metadata of a graph that computes a token to the same bits whatever is computed with it: found out on this board."""

MAX_MATRIX_DIM: Final = 1 << 24
"""Most rows or columns of a matrix: many times those of the largest vocabulary."""
