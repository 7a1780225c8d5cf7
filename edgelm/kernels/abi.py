"""The contract between the compiled kernels and their callers: weight formats, symbols, the state of a node.

Knows neither LLVM nor onnxruntime nor the graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

PANEL_COLUMNS: Final = 16
"""Columns of a panel: the widest vector register holds a 32-bit sum of each; narrower processors use several."""

ALIGN: Final = 64
"""Alignment in bytes of the tensors in the data file: one cache line."""

NO_OFFSET: Final = -1
"""File offset that stands for an absent tensor."""

KERNELS_VERSION: Final = 8
"""Version of the kernels and of the panel layout: graphs packed for another version are not used."""

ATTENTION: Final = "Attention"
ATTENTION_SYMBOL: Final = "compute_attention"
"""Symbol of the function that computes attention."""
MAX_QUERY_TILE: Final = 32
"""Queries that one attention task computes at once; also the maximum of query heads for one KV head."""
MAX_KERNEL_HEAD_SIZE: Final = 256
"""Largest head size that the attention kernels support."""

MAX_INT8_CODE: Final = 127
MAX_INT16_CODE: Final = 127 * 256 + 127
"""Largest code of a 16-bit activation: it fits into two signed bytes, and 128 products with weights fit into int32."""

BLOCK_SIZES: Final = (16, 32, 64, 128)
"""Supported block sizes; 5 and 6 bits need at least 32."""

QUANT_PARAM_BYTES: Final = 8
"""Bytes of the scale (float32) and the zero-point term (int32) of a block of quantized activations."""

SET_CALLBACK_SYMBOL: Final = "edgelm_set_hook"
"""Exported: sets the function that `RegisterCustomOps` calls."""
REGISTER: Final = "RegisterCustomOps"
DESTROY: Final = "edgelm_destroy"
"""Exported: does nothing, because Python owns the state of a node."""


@dataclass(frozen=True, slots=True, order=True)
class WeightFormat:
    """How a matrix is quantized: bits of a weight, and number of weights that share a scale."""

    bits: int
    block_size: int

    @classmethod
    def from_op_type(cls, name: str) -> WeightFormat | None:
        """Return the format of a MatMul operator of ours; None for other operators."""
        found = re.fullmatch(r"MatMulInt(\d+)Block(\d+)", name)
        return cls(int(found[1]), int(found[2])) if found else None

    @property
    def has_kernels(self) -> bool:
        """Whether there are kernels for this format."""
        return self in SUPPORTED_FORMATS

    @property
    def high_bits(self) -> int:
        """Bits of a weight that are stored separately from its low 4 bits: 1 for 5 bits, 2 for 6 bits, else 0."""
        return self.bits - 4 if self.bits in (5, 6) else 0

    @property
    def matmul_op_type(self) -> str:
        """Name of the MatMul operator."""
        return f"MatMulInt{self.bits}Block{self.block_size}"

    @property
    def matmul_symbol(self) -> str:
        """Symbol of the function that computes the MatMul operator."""
        return f"compute_{self.bits}_{self.block_size}"

    @property
    def gather_op_type(self) -> str:
        """Name of the Gather operator, which reads rows of a table of this format."""
        return f"LookUpInt{self.bits}Block{self.block_size}"

    @property
    def gather_symbol(self) -> str:
        """Symbol of the function that computes the Gather operator."""
        return f"look_up_{self.bits}_{self.block_size}"

    @property
    def code_bytes(self) -> int:
        """Bytes of an activation's code: 2 for 8-bit weights, else 1.

        With 1 byte, two thirds of an int8 bundle's divergence from float32 come from activations (SmolLM2-135M: KL
        .0040 instead of .0011).
        """
        return 2 if self.bits == 8 else 1

    @property
    def max_code(self) -> int:
        """Code of the activation with the largest absolute value in a block."""
        return MAX_INT16_CODE if self.code_bytes == 2 else MAX_INT8_CODE

    @property
    def block_bytes(self) -> int:
        """Bytes of the codes of a block of one column."""
        return self.block_size * self.bits // 8


SUPPORTED_FORMATS: Final = tuple(
    WeightFormat(bits, block) for bits in (4, 5, 6, 8) for block in BLOCK_SIZES if block > 16 or bits in (4, 8)
)
"""Formats with kernels."""


def is_operator(name: str) -> bool:
    """Return whether a name is that of a MatMul or Gather operator of ours."""
    return any(name in (fmt.matmul_op_type, fmt.gather_op_type) for fmt in SUPPORTED_FORMATS)


class StateField(IntEnum):
    """Fields of a node's state, 64 bits each: sizes, addresses of constants, addresses of onnxruntime's C functions.

    BIAS and NORM may be null. The lower 32 bits of EPSILON, SCALE and SOFTCAP are a float32.
    """

    K = 0
    N = 1
    PANELS_PER_TASK = 2
    GET_INPUT = 3
    GET_OUTPUT = 4
    GET_DATA = 5
    GET_SHAPE = 6
    GET_RANK = 7
    GET_DIMENSIONS = 8
    RELEASE_SHAPE = 9
    PARALLEL_FOR = 10
    GATED = 11
    WEIGHTS = 12
    SCALES = 13
    BIAS = 14
    NORM = 15
    EPSILON = 16
    HEADS = 17
    KV_HEADS = 18
    HALF = 19
    WINDOW = 20
    SCALE = 21
    SOFTCAP = 22
    CREATE_STATUS = 23
    ERROR_MESSAGES = 24


class InputErrorCode(IntEnum):
    """Errors in the inputs of an operator: indices into the message table that StateField.ERROR_MESSAGES points to."""

    RANK = 0
    WIDTH = 1
    SKIP = 2
    PROJECTIONS = 3
    KV_CACHE = 4
    HEAD = 5
    TOKENS = 6
    LENGTHS = 7
    TABLES = 8
    POSITIONS = 9


ERROR_MESSAGES: Final = {
    InputErrorCode.RANK: "an input has the wrong number of dimensions",
    InputErrorCode.WIDTH: "the last dimension of the input does not match K of the matrix",
    InputErrorCode.SKIP: "the skip input does not have the shape of the output",
    InputErrorCode.PROJECTIONS: "the shapes of query, key and value do not match the heads and the batch",
    InputErrorCode.KV_CACHE: "the shape of the KV cache does not match the heads and the batch",
    InputErrorCode.HEAD: "there are no kernels for this head size",
    InputErrorCode.TOKENS: "there are more new tokens than positions in the KV cache",
    InputErrorCode.LENGTHS: "the lengths do not match the batch, or a length is outside the KV cache",
    InputErrorCode.TABLES: "the rotary tables do not match the head size, or have too few rows",
    InputErrorCode.POSITIONS: "the positions do not match the tokens, or a position is outside the rotary tables",
}
