"""`--quant keep`: copies the codes of matrices that a GGUF file stores in compatible blocks.

Q4_0 and Q8_0 are symmetric blocks of 32 weights with a float16 scale, which `quantize.pack` can store. A matrix of the
graph is kept if all its tensors have the same one of these formats; other matrices are rounded to int8.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np

from edgelm.errors import EdgelmError

from ..architectures.decoder import DecoderConfig
from ..architectures.weights import DecoderWeights
from ..checkpoint import Checkpoint, GgufBlocks, GgufTensors, TensorSource
from ..checkpoint.matrix_reader import CHUNK_BYTES
from ..vocabulary import PrunedWeights
from .matrix_plan import DEFAULT_BLOCK_SIZE, QuantPlan
from .pack import PackedMatrix, pack_codes
from .spec import KEEP, QuantSpec

FORMATS: Final = {"Q4_0": 4, "Q8_0": 8}
"""GGUF formats that are kept, and their bits."""

MIN_FLOAT16_SCALE: Final = 2.0**-24
"""Scale stored for a block of zeros: the least float16, because a scale may not be zero."""


def plan_kept_blocks(weights: DecoderWeights) -> QuantPlan:
    """Return the plan that keeps every matrix that can be kept. Raises `EdgelmError` if there is none."""
    kept: dict[str, QuantSpec | None] = {}
    for name, _ in weights.matrix_shapes():
        bits = _bits(weights, name)
        if bits is not None:
            kept[name] = QuantSpec(bits, DEFAULT_BLOCK_SIZE, method=KEEP)
    if not kept:
        kinds = Counter(
            _kind(weights.source, part) for name, _ in weights.matrix_shapes() for part, _ in _parts(weights, name)
        )
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise EdgelmError(
            f"--quant keep: none of the matrices is stored in {' or '.join(FORMATS)} blocks (there are {found});"
            " choose another precision, such as --quant int8"
        )
    return QuantPlan(QuantSpec(8, DEFAULT_BLOCK_SIZE, method="rtn"), kept)


def read_kept_matrix(weights: DecoderWeights, name: str) -> PackedMatrix:
    """Return a kept matrix; reads some rows at a time. Raises `CheckpointError` for a damaged one."""
    pieces = []
    for part, shape in _parts(weights, name):
        step = max(1, CHUNK_BYTES // (4 * shape[1]))
        for start in range(0, shape[0], step):
            blocks = _blocks(weights.source, part, shape, slice(start, min(start + step, shape[0])))
            if blocks is None:
                raise AssertionError(f"{part} is not stored in blocks that can be kept")
            pieces.append(
                _packed(blocks, weights.decoder.residual_scale if _is_scaled(weights.decoder, name) else None)
            )
    return PackedMatrix.join_rows(pieces)


def scale_bits(decoder: DecoderConfig, name: str) -> int:
    """Return the bits of each scale of a kept matrix: 32 if the decoder multiplies the matrix by a residual scale."""
    return 32 if _is_scaled(decoder, name) else 16


def _packed(blocks: GgufBlocks, factor: float | None) -> PackedMatrix:
    codes = blocks.codes.reshape(*blocks.scales.shape, DEFAULT_BLOCK_SIZE)
    empty = blocks.scales == 0
    codes[empty] = 1 << (blocks.bits - 1)
    scales = np.where(empty, np.float16(MIN_FLOAT16_SCALE), blocks.scales)
    stored = scales if factor is None else scales.astype(np.float32) * np.float32(factor)
    return pack_codes(codes.reshape(blocks.codes.shape), stored, None, blocks.bits, blocks.codes.shape[1])


def _bits(weights: DecoderWeights, name: str) -> int | None:
    """Return the bits of a matrix that can be kept, otherwise None."""
    d = weights.decoder
    if d.padded_head_size != d.head_size and name.endswith((".qkv", ".output")):
        return None  # padding would be inserted between its rows or columns
    kinds = {_kind(weights.source, part) for part, _ in _parts(weights, name)}
    return FORMATS.get(kinds.pop()) if len(kinds) == 1 else None


def _is_scaled(d: DecoderConfig, name: str) -> bool:
    return d.residual_scale != 1 and name.endswith((".output", ".down"))


def _parts(weights: DecoderWeights, name: str) -> list[tuple[str, tuple[int, int]]]:
    """Return the tensors whose rows, concatenated, are a matrix, with their shapes."""
    d, n = weights.decoder, weights.tensor_names
    if name in ("embedding", "head"):
        return [(n.embedding if name == "embedding" else n.head, (d.vocab_size, d.hidden_size))]
    _, i, part = name.split(".")
    queries, keys = d.heads * d.head_size, d.kv_heads * d.head_size
    split = {
        "qkv": [(n.query, queries), (n.key, keys), (n.value, keys)],
        "output": [(n.output, d.hidden_size)],
        "gate_up": [(n.gate, d.mlp_size), (n.up, d.mlp_size)],
        "down": [(n.down, d.hidden_size)],
    }
    fused = {"qkv": n.qkv, "gate_up": n.gate_up}.get(part)
    parts = [(fused, sum(rows for _, rows in split[part]))] if fused else split[part]
    columns = {"output": queries, "down": d.mlp_size}.get(part, d.hidden_size)
    return [(tensor.format(i=i), (rows, columns)) for tensor, rows in parts]


def _kind(source: TensorSource, name: str) -> str:
    """Return the name of a tensor's storage format."""
    if isinstance(source, PrunedWeights):
        return _kind(source.source, name)
    tensors = source.tensors if isinstance(source, Checkpoint) else source
    return tensors.kind(name) if isinstance(tensors, GgufTensors) else "of a checkpoint that is no GGUF file"


def _blocks(source: TensorSource, name: str, shape: tuple[int, int], rows: slice) -> GgufBlocks | None:
    """Return rows of a tensor in their stored blocks; None if they are not stored in such blocks."""
    if isinstance(source, PrunedWeights):
        if name not in source.names:
            return _blocks(source.source, name, shape, rows)
        old = source.kept_ids[rows]
        first = int(old.min())
        found = _blocks(source.source, name, (source.rows, shape[1]), slice(first, int(old.max()) + 1))
        return found and GgufBlocks(found.codes[old - first], found.scales[old - first], found.bits)
    tensors = source.tensors if isinstance(source, Checkpoint) else source
    return tensors.blocks(name, shape, rows) if isinstance(tensors, GgufTensors) else None
