"""Attention with an int8 KV cache, as plain loops in float64: an independent oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Step:
    """The output of one token, [heads * size] each: with int8, without it, and the bound of their difference."""

    out: np.ndarray
    exact: np.ndarray
    bound: np.ndarray


class Int8Layer:
    """Grouped-query attention of one row. `codes`: int8 [kv_heads, size] of each position, for "key" and "value"."""

    def __init__(self, heads, kv_heads, size, scales, tables, window, softcap):
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.scales = {"key": scales.key.astype(np.float64), "value": scales.value.astype(np.float64)}
        self.tables, self.window, self.softcap = tables, window, softcap
        self.exact = {"key": [], "value": []}
        self.codes = {"key": [], "value": []}

    def step(self, packed):
        """Compute the next token from its query, keys and values, float32 [(heads + 2 kv_heads) * size]."""
        parts = packed.astype(np.float64).reshape(-1, self.size)
        at, keys_from = len(self.codes["key"]), self.heads
        queries = [self.rotated(part, at) for part in parts[:keys_from]]
        new = {
            "key": np.array([self.rotated(part, at) for part in parts[keys_from : keys_from + self.kv_heads]]),
            "value": parts[keys_from + self.kv_heads :],
        }
        for part, values in new.items():
            self.exact[part].append(values)
            codes = np.zeros(values.shape, int)
            for head in range(self.kv_heads):
                for channel in range(self.size):
                    nearest = round(values[head, channel] / self.scales[part][head, channel])
                    codes[head, channel] = min(max(nearest, -128), 127)
            self.codes[part].append(codes)
        seen = range(max(0, at + 1 - self.window) if self.window else 0, at + 1)
        done = [self.attend(queries[head], head * self.kv_heads // self.heads, seen) for head in range(self.heads)]
        return Step(*(np.concatenate(values) for values in zip(*done, strict=True)))

    def rotated(self, part, at):
        if self.tables is None:
            return part
        cosines, sines = (table[at].astype(np.float64) for table in self.tables)
        first, second = part[: self.size // 2], part[self.size // 2 :]
        return np.concatenate([first * cosines - second * sines, second * cosines + first * sines])

    def attend(self, query, head, seen):
        """Return one query's results with int8 and without it, and the bound of their difference.

        A value differs by at most its rounding error; a score differs by at most e, so each weight differs by a factor
        of at most exp(2 e).
        """
        read = {part: [self.codes[part][p][head] * self.scales[part][head] for p in seen] for part in self.codes}
        exact = {part: [self.exact[part][p][head] for p in seen] for part in self.exact}
        allowed = {
            part: np.array(
                [
                    np.maximum(self.scales[part][head] / 2, np.abs(x) - 127 * self.scales[part][head])
                    for x in exact[part]
                ]
            )
            for part in exact
        }
        off = max(float(np.abs(query) @ error) for error in allowed["key"]) * self.size**-0.5
        largest = np.abs(exact["value"]).max(axis=0)
        bound = allowed["value"].max(axis=0) + math.expm1(2 * off) * largest
        return self.mix(query, **read), self.mix(query, **exact), bound

    def mix(self, query, key, value):
        scores = [float(query @ each) * self.size**-0.5 for each in key]
        if self.softcap is not None:
            scores = [self.softcap * math.tanh(score / self.softcap) for score in scores]
        weights = [math.exp(score - max(scores)) for score in scores]
        return sum(weight * each for weight, each in zip(weights, value, strict=True)) / sum(weights)
