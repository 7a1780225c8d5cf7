"""Random inputs of attention, and the expected outputs."""

from __future__ import annotations

import numpy as np
from attention_nodes import ours, run, session_of
from naive_kernel_attention import attend


class Case:
    """Random inputs. Positions of the KV cache after a row's length are NaN: they must not be used."""

    def __init__(self, shape, seed, *, batch=1, tokens=1, longest=300, lengths=None, has_positions=False):
        rng = np.random.default_rng(seed)
        self.shape, self.tokens = shape, tokens
        self.lengths = rng.integers(0, longest + 1, batch) if lengths is None else np.array(lengths)
        capacity = int(self.lengths.max()) + tokens + int(rng.integers(0, 40))
        self.past = rng.normal(size=(2, batch, shape.kv_heads, capacity, shape.size)).astype(np.float32)
        for row, length in enumerate(self.lengths):
            self.past[:, row, :, length:] = np.nan
        angles = rng.normal(size=(2 * capacity, shape.half)).astype(np.float32)
        self.tables = np.cos(angles), np.sin(angles)
        heads = shape.heads + 2 * shape.kv_heads
        self.packed = rng.normal(size=(batch, tokens, heads, shape.size)).astype(np.float32) * np.float32(2)
        self.positions = rng.integers(0, 2 * capacity, (batch, tokens)) if has_positions and shape.half else None

    def parts(self):
        return np.split(self.packed, [self.shape.heads, self.shape.heads + self.shape.kv_heads], axis=2)

    def feeds(self, packed=True, rows=slice(None)):
        some = self.packed[rows]
        flat = [each[rows].reshape(*some.shape[:2], -1) for each in ([self.packed] if packed else self.parts())]
        seqlens = (self.lengths[rows] + self.tokens - 1).astype(np.int32)
        feeds = dict(zip(("query", "key", "value"), flat, strict=False))
        feeds |= {"past_key": self.past[0][rows].copy(), "past_value": self.past[1][rows].copy(), "seqlens": seqlens}
        if self.shape.half:
            feeds |= dict(zip(("cos", "sin"), self.tables, strict=True))
        if self.positions is not None:
            feeds["positions"] = self.positions[rows].astype(np.int64)
        return feeds

    def expected(self):
        out, memory = attend(self.shape, *self.parts(), self.past, self.lengths, self.tables, self.positions)
        return out.reshape(*out.shape[:2], -1), memory


def check_case(operators, case, *, packed=True, in_place=True, threads=2):
    """Compare the output and the KV cache of the kernels with plain loops."""
    feeds = case.feeds(packed)
    session = session_of(ours(case.shape, feeds), feeds, operators=operators, threads=threads)
    found = run(session, feeds, in_place=in_place)
    y, *memory = (found, feeds["past_key"], feeds["past_value"]) if in_place else found
    expected, expected_memory = case.expected()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for part, wanted in zip(memory, expected_memory, strict=True):
        np.testing.assert_allclose(part, wanted, rtol=1e-5, atol=1e-6)  # NaN equals NaN
