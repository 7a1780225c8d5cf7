"""Expands codes of 5 and 6 bits to 8 bits before onnxruntime loads a graph for its own kernels.

onnxruntime would compute them itself, by constant folding, but it keeps all intermediate results until the graph is
loaded: twelve bytes per weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.graph.onnx_model import (
    INT64,
    UINT8,
    Model,
    Tensor,
    encode_model,
    encode_tensor,
    is_ort_operator,
    read_model,
)
from edgelm.kernels.rewrite.split_codes import SplitCodeMatcher

_SIGN: Final = b"BitwiseXor"
"""A graph without this operator has no split codes."""

_DTYPES: Final[dict[int, np.dtype[Any]]] = {UINT8: np.dtype("u1"), INT64: np.dtype("<i8")}

_CODES_PER_STEP: Final = 1 << 22
"""Codes that are expanded at once, which bounds the memory for intermediate results."""

Codes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ExpandedModel:
    """An encoded model whose 8-bit codes are external initializers, and their values by name, for onnxruntime."""

    model: bytes
    codes: Mapping[str, Codes]


def expand_codes(model: bytes, data: Path) -> ExpandedModel | None:
    """Expand the split codes of an encoded model whose weights lie in the file `data`; None if it has none.

    Raises `ValueError` if the model is not an ONNX model, and `OSError` if the file cannot be read.
    """
    if _SIGN not in model:
        return None
    whole = read_model(model)
    stored = np.memmap(data, np.uint8, "r") if data.exists() and data.stat().st_size else np.zeros(0, np.uint8)
    codes = _find_codes(whole, stored)
    if not codes:
        return None
    needed = set(whole.outputs)
    nodes: list[bytes] = []
    for node in reversed(whole.nodes):
        if needed.intersection(node.outputs) and not codes.keys() & set(node.outputs):
            nodes.append(node.encoded)
            needed.update(node.inputs)
    used = {name: values for name, values in codes.items() if name in needed}
    tensors = [tensor.encoded for name, tensor in whole.tensors.items() if name in needed]
    tensors += [encode_tensor(name, each.shape, UINT8, data.name, 0, each.nbytes) for name, each in used.items()]
    return ExpandedModel(encode_model(whole, nodes[::-1], tensors), used)


def _find_codes(model: Model, stored: Codes) -> dict[str, Codes]:
    """Return the expanded codes of all matrices and tables, by the name of the value that holds them."""

    def array(tensor: Tensor) -> NDArray[Any]:
        source = tensor.raw if tensor.external_range is None else stored[tensor.external_range]
        return np.frombuffer(source, _DTYPES[tensor.dtype], int(np.prod(tensor.shape, dtype=np.int64)))

    producers = {output: node for node in model.nodes for output in node.outputs if output}
    matcher = SplitCodeMatcher(model.tensors, producers, array)
    codes: dict[str, Codes] = {}

    def expand(name: str, shape: tuple[int, int, int]) -> None:
        parts = None if name in codes else matcher.match_parts(name, shape)
        if parts is not None:
            bits, low, high = parts
            codes[name] = _expand(array(low), array(high), bits).reshape(shape)

    for node in model.nodes:
        if is_ort_operator(node, "MatMulNBits") and node.attributes.get("bits") == 8:
            columns, size, block = (int(node.attributes[name]) for name in ("N", "K", "block_size"))
            expand(node.inputs[1], (columns, -(-size // block), block))
        elif is_ort_operator(node, "GatherBlockQuantized") and node.attributes.get("bits") == 8:
            table = producers.get(node.inputs[0])
            shape = (
                None if table is None or not is_ort_operator(table, "Reshape") else matcher.constant(table.inputs[1])
            )
            if table is None or shape is None or len(shape) != 2:
                continue
            block = int(node.attributes["block_size"])
            expand(table.inputs[0], (shape[0], shape[1] // block, block))
            if table.inputs[0] in codes:
                codes[node.inputs[0]] = codes[table.inputs[0]].reshape(shape)
    return codes


def _expand(low: Codes, high: Codes, bits: int) -> Codes:
    """Return 8-bit codes, uint8 [n], with zero point 128 instead of 2^(bits-1).

    low: uint8 [n / 2], two codes' low 4 bits a byte; high: uint8 [n * (bits - 4) / 8], the bits above.
    """
    count, width = 2 * len(low), bits - 4
    whole = np.empty(count, np.uint8)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    for start in range(0, count, _CODES_PER_STEP):
        stop = min(start + _CODES_PER_STEP, count)
        packed = low[start // 2 : stop // 2]
        whole[start:stop:2] = packed & np.uint8(15)
        whole[start + 1 : stop : 2] = packed >> np.uint8(4)
        above = high[start * width // 8 : stop * width // 8, None] >> shifts & np.uint8((1 << width) - 1)
        whole[start:stop] |= above.reshape(-1) << np.uint8(4)
        whole[start:stop] += np.uint8(128 - (1 << (bits - 1)))
    return whole
