"""The attention kernels as plain loops in float64: an independent oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Attributes of an attention node. half: number of rotated pairs of a head; window and softcap: 0 for none."""

    heads: int
    kv_heads: int
    size: int
    half: int = 0
    window: int = 0
    softcap: float = 0.0
    scale: float = 1.0


def rotated(head, half, cos, sin):
    """Return one head of a token with number i rotated together with number i + half."""
    head = [float(value) for value in head]
    result = list(head)
    for i in range(half):
        result[i] = head[i] * cos[i] - head[i + half] * sin[i]
        result[i + half] = head[i + half] * cos[i] + head[i] * sin[i]
    return result


def attend(shape, query, key, value, past, lengths, tables, positions=None):
    """Return the output, with the shape of the query, and keys and values with the new positions.

    query [B, S, heads, size]; key and value [B, S, kv_heads, size]; past: two of [B, kv_heads, capacity, size];
    lengths: number of past positions of each row; tables: cosines and sines, [positions, half] each.
    """
    batch, tokens = query.shape[:2]
    present = [np.array(each, np.float64) for each in past]
    out = np.zeros(query.shape)

    def rotate(head, row, token):
        position = lengths[row] + token if positions is None else positions[row, token]
        return rotated(head, shape.half, *(table[position] for table in tables))

    for row in range(batch):
        for token in range(tokens):
            for head in range(shape.kv_heads):
                present[0][row, head, lengths[row] + token] = rotate(key[row, token, head], row, token)
                present[1][row, head, lengths[row] + token] = value[row, token, head]
        for token in range(tokens):
            last = lengths[row] + token
            first = max(0, last - shape.window + 1) if shape.window else 0
            for head in range(shape.heads):
                own = head // (shape.heads // shape.kv_heads)
                turned = rotate(query[row, token, head], row, token)
                scores = []
                for position in range(first, last + 1):
                    key_there = present[0][row, own, position]
                    score = shape.scale * sum(a * b for a, b in zip(turned, key_there, strict=True))
                    scores.append(shape.softcap * math.tanh(score / shape.softcap) if shape.softcap else score)
                powers = [math.exp(score - max(scores)) for score in scores]
                for power, position in zip(powers, range(first, last + 1), strict=True):
                    out[row, token, head] += power / sum(powers) * present[1][row, own, position]
    return out, present
