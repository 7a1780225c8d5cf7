"""How one matrix is to be stored: bits, block size, zero points, the method that chooses codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Method = Literal["rtn", "clip", "hqq", "gptq", "keep"]
METHODS: Final[tuple[Method, ...]] = ("rtn", "clip", "hqq", "gptq")
"""Those that can be chosen: round to nearest; search of scales (data-free); HQQ (data-free); GPTQ, which needs
calibration text. `keep` stands for codes that the checkpoint has already."""


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How one matrix is stored and by which method its codes are chosen.

    bits: 4, 5, 6 or 8, 5 and 6 symmetric only; 32 says not quantized, and never reaches the quantizer. block_size:
    weights a scale along a row, 16, 32, 64 or 128. symmetric: the zero point is 2^(bits-1), else one is stored for
    every block. accuracy_level: that of MatMulNBits (4: activations rounded to int8).
    """

    bits: int
    block_size: int
    symmetric: bool = True
    method: Method = "clip"
    accuracy_level: int = 4
