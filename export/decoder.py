"""What a decoder-only transformer is, as numbers: the shapes and options that every family maps onto.

Knows neither Hugging Face names nor ONNX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864, section 3.2.2) and its stretching.

    `linear` divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595); `llama3` divides the low frequencies
    only and interpolates between (Llama 3.1's own rule, with wavelengths relative to `original_context`).
    """

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def frequencies(self, head_size: int) -> NDArray[np.float32]:
        """Radians a position, float32 [head_size / 2], computed in float32 as models were trained."""
        exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
        frequencies: NDArray[np.float32] = np.float32(1) / np.power(np.float32(self.theta), exponents)
        if self.kind == "linear":
            frequencies = frequencies / np.float32(self.factor)
        if self.kind == "llama3":
            wavelengths = 2 * math.pi / frequencies
            smooth = (self.original_context / wavelengths - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            smooth = np.clip(smooth, 0.0, 1.0)
            frequencies = ((1 - smooth) * frequencies / self.factor + smooth * frequencies).astype(np.float32)
        return frequencies

    def tables(self, context: int, head_size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines, float32 [context, head_size / 2] each."""
        angles: NDArray[np.float32] = np.arange(context, dtype=np.float32)[:, None] * self.frequencies(head_size)
        cosines: NDArray[np.float32] = np.cos(angles)
        sines: NDArray[np.float32] = np.sin(angles)
        return cosines, sines


@dataclass(frozen=True, slots=True)
class Decoder:
    """Shapes and options of a pre-norm, gated, grouped-query decoder.

    Widths count elements; `context` counts positions.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    context: int
    norm_epsilon: float
    rope: Rope
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False

    @property
    def padded_head_size(self) -> int:
        """Head size in the graph: the CPU attention kernel's rotary needs a multiple of 16."""
        return -(-self.head_size // 16) * 16


@dataclass(frozen=True, slots=True)
class Names:
    """Where a checkpoint keeps each tensor; `{i}` stands for the layer. A bias is its weight's name with `.bias`."""

    embedding: str
    head: str
    final_norm: str
    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    mlp_norm: str
    gate: str
    up: str
    down: str
