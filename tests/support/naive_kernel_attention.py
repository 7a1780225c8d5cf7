"""Plain-loop twin of the attention kernels: written for reading, as an independent oracle, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """What an attention node is told. `half`: pairs of numbers that are rotated; window and softcap: 0 for none."""

    heads: int
    kv_heads: int
    size: int
    half: int = 0
    window: int = 0
    softcap: float = 0.0
    scale: float = 1.0


def rotated(head, half, cos, sin):
    """One head of a token: number i is turned with number i + half."""
    head = [float(value) for value in head]
    result = list(head)
    for i in range(half):
        result[i] = head[i] * cos[i] - head[i + half] * sin[i]
        result[i + half] = head[i + half] * cos[i] + head[i] * sin[i]
    return result


def attend(shape, query, key, value, past, lengths, tables, positions=None):
    """query [B, S, heads, size], key and value [B, S, kv_heads, size], past: two of [B, kv_heads, capacity, size].

    lengths: each row's positions before; tables: cosines and sines, [positions, half] each. Returns the output, like
    the query, and the memory with the new positions.
    """
    batch, tokens = query.shape[:2]
    memory = [np.array(each, np.float64) for each in past]
    out = np.zeros(query.shape)

    def turn(head, row, token):
        place = lengths[row] + token if positions is None else positions[row, token]
        return rotated(head, shape.half, *(table[place] for table in tables))

    for row in range(batch):
        for token in range(tokens):
            for head in range(shape.kv_heads):
                memory[0][row, head, lengths[row] + token] = turn(key[row, token, head], row, token)
                memory[1][row, head, lengths[row] + token] = value[row, token, head]
        for token in range(tokens):
            last = lengths[row] + token
            first = max(0, last - shape.window + 1) if shape.window else 0
            for head in range(shape.heads):
                own = head // (shape.heads // shape.kv_heads)
                turned = turn(query[row, token, head], row, token)
                scores = []
                for place in range(first, last + 1):
                    score = shape.scale * sum(a * b for a, b in zip(turned, memory[0][row, own, place], strict=True))
                    scores.append(shape.softcap * math.tanh(score / shape.softcap) if shape.softcap else score)
                powers = [math.exp(score - max(scores)) for score in scores]
                for power, place in zip(powers, range(first, last + 1), strict=True):
                    out[row, token, head] += power / sum(powers) * memory[1][row, own, place]
    return out, memory
