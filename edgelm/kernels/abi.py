"""What the kernels and those who use them agree on: formats of matrices, names of functions, a node's state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

PANEL_COLUMNS: Final = 16
"""Columns of a panel: as many 32-bit sums as the widest vector holds; narrower ones take several."""

ALIGN: Final = 64
"""Tensors in the file of matrices begin at multiples of this: a line of the caches."""

NO_OFFSET: Final = -1
"""The place of what a node does not have."""

KERNELS_VERSION: Final = 8
"""Changes with what the kernels compute, or with how they want matrices to lie."""

ATTENTION: Final = "Attention"
ATTENTION_SYMBOL: Final = "compute_attention"
"""What computes it, by the name that the library exports."""
MAX_QUERY_TILE: Final = 32
"""Queries that attention takes at once: at least as many as a head of keys and values may have."""
MAX_KERNEL_HEAD_SIZE: Final = 256

MAX_INT8_CODE: Final = 127
MAX_INT16_CODE: Final = 127 * 256 + 127
"""The largest code of an activation of 16 bits: two signed bytes hold it, and 32 bits 128 products with weights."""

BLOCK_SIZES: Final = (16, 32, 64, 128)
"""Block sizes that there are kernels for; with 5 and 6 bits from 32 on."""

QUANT_PARAM_BYTES: Final = 8
"""Bytes that a block of rounded activations takes beside its codes: a scale and an offset."""

SET_CALLBACK_SYMBOL: Final = "edgelm_set_hook"
"""Exported: sets what `RegisterCustomOps` calls."""
REGISTER: Final = "RegisterCustomOps"
DESTROY: Final = "edgelm_destroy"
"""Exported: does nothing, as the state of a node is Python's."""


@dataclass(frozen=True, slots=True, order=True)
class WeightFormat:
    """How a matrix is quantized: bits of a weight, weights that share a scale."""

    bits: int
    block_size: int

    @classmethod
    def from_op_type(cls, name: str) -> WeightFormat | None:
        """Return the format that an operator is for; None where it is none of ours."""
        found = re.fullmatch(r"MatMulInt(\d+)Block(\d+)", name)
        return cls(int(found[1]), int(found[2])) if found else None

    @property
    def has_kernels(self) -> bool:
        """Whether there are kernels for it."""
        return self in SUPPORTED_FORMATS

    @property
    def high_bits(self) -> int:
        """Bits of a weight that are stored apart from its low 4: 1 or 2 with 5 and 6 bits, else 0."""
        return self.bits - 4 if self.bits in (5, 6) else 0

    @property
    def matmul_op_type(self) -> str:
        """The name of the operator for matrices of this format."""
        return f"MatMulInt{self.bits}Block{self.block_size}"

    @property
    def matmul_symbol(self) -> str:
        """The function that computes a node, by the name that the library exports."""
        return f"compute_{self.bits}_{self.block_size}"

    @property
    def gather_op_type(self) -> str:
        """The name of the operator that looks rows up in a table of this format."""
        return f"LookUpInt{self.bits}Block{self.block_size}"

    @property
    def gather_symbol(self) -> str:
        """The function that looks rows up, by the name that the library exports."""
        return f"look_up_{self.bits}_{self.block_size}"

    @property
    def code_bytes(self) -> int:
        """The bytes of an activation's code: two where weights have 8 bits.

        With one, two thirds of an int8 bundle's divergence from float32 come from activations (SmolLM2-135M: KL .0040
        instead of .0011).
        """
        return 2 if self.bits == 8 else 1

    @property
    def largest_code(self) -> int:
        """The code of a block's largest activation."""
        return MAX_INT16_CODE if self.code_bytes == 2 else MAX_INT8_CODE

    @property
    def block_bytes(self) -> int:
        """The bytes of a block of one column."""
        return self.block_size * self.bits // 8


SUPPORTED_FORMATS: Final = tuple(
    WeightFormat(bits, block) for bits in (4, 5, 6, 8) for block in BLOCK_SIZES if block > 16 or bits in (4, 8)
)
"""Formats that there are kernels for."""


def is_operator(name: str) -> bool:
    """Whether an operator is for products with, or rows of, matrices of one of the formats."""
    return any(name in (fmt.matmul_op_type, fmt.gather_op_type) for fmt in SUPPORTED_FORMATS)


class StateField(IntEnum):
    """Fields of a node's state, 64 bits each: its sizes, addresses of its constants, functions of onnxruntime's C API.

    BIAS and NORM may be null; of EPSILON, SCALE and SOFTCAP the lower half is a float32.
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
    """What can be wrong with what an operator is given: places in the table of texts that ERROR_MESSAGES points to."""

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
    InputErrorCode.RANK: "an input has another number of dimensions than the operator takes",
    InputErrorCode.WIDTH: "the input's last dimension is not the matrix's K",
    InputErrorCode.SKIP: "what is added has not the shape of the product",
    InputErrorCode.PROJECTIONS: "query, key and value do not have the widths and lengths of the heads",
    InputErrorCode.KV_CACHE: "the memory of keys or of values has not the shape of the heads and the batch",
    InputErrorCode.HEAD: "the size of a head is not one that there are kernels for",
    InputErrorCode.TOKENS: "there are more new tokens than the memory holds",
    InputErrorCode.LENGTHS: "there are fewer lengths than rows of the batch, or a length that the memory does not hold",
    InputErrorCode.TABLES: "the rotary tables have not the width of a head or too few rows",
    InputErrorCode.POSITIONS: "there are fewer positions than tokens, or a position that the rotary tables do not have",
}
"""Texts of the faults."""
