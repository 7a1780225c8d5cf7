"""Replaces onnxruntime's attention nodes by ours, if our kernels support them."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from edgelm.graph.domain import DOMAIN
from edgelm.graph.onnx_model import FLOAT, Model, Node, encode_node, is_ort_operator
from edgelm.kernels.abi import ATTENTION, MAX_KERNEL_HEAD_SIZE, MAX_QUERY_TILE, PANEL_COLUMNS

GROUP_QUERY_ATTENTION: Final = "GroupQueryAttention"
_QUERY, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _SEQLENS, _COS, _SIN, _POSITIONS = 0, 1, 2, 3, 4, 5, 7, 8, 9
_KNOWN: Final = frozenset(
    {"num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved", "local_window_size", "softcap"}
)


def lower_attention(model: Model, node: Node) -> tuple[bytes, list[str]] | None:
    """Return the encoded attention node that replaces a GroupQueryAttention, and its inputs; None if unsupported.

    Not supported: an int8 KV cache, interleaved rotation, head sizes that are not multiples of 16.
    """
    if (
        not is_ort_operator(node, GROUP_QUERY_ATTENTION)
        or not node.attributes.keys() <= _KNOWN
        or len(node.outputs) != 3
    ):
        return None
    inputs = [*node.inputs, *[""] * 10]
    past = model.inputs.get(inputs[_PAST_KEY])
    heads, kv_heads = (int(node.attributes.get(name, 0)) for name in ("num_heads", "kv_num_heads"))
    if past is None or past.dtype != FLOAT or len(past.shape) != 4 or not kv_heads or any(inputs[_POSITIONS + 1 :]):
        return None
    size = past.shape[-1]
    is_rotated = bool(node.attributes.get("do_rotary", 0))
    table = model.tensors.get(inputs[_COS])
    if (
        size % PANEL_COLUMNS
        or not PANEL_COLUMNS <= size <= MAX_KERNEL_HEAD_SIZE
        or heads % kv_heads
        or heads // kv_heads > MAX_QUERY_TILE
        or node.attributes.get("rotary_interleaved", 0)
        or (is_rotated and (table is None or len(table.shape) != 2))
        or bool(inputs[_KEY]) != bool(inputs[_VALUE])
    ):
        return None
    scale = node.attributes.get("scale", 0.0) or 1 / math.sqrt(size)
    attributes = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": table.shape[1] if is_rotated and table is not None else 0,
        "WINDOW": max(0, int(node.attributes.get("local_window_size", 0))),
        "SCALE": _bits(scale),
        "SOFTCAP": _bits(node.attributes.get("softcap", 0.0)),
    }
    rotary = [inputs[_COS], inputs[_SIN], inputs[_POSITIONS]] if is_rotated else ["", "", ""]
    kept = [*(inputs[i] for i in (_QUERY, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _SEQLENS)), *rotary]
    while not kept[-1]:
        kept.pop()
    outputs = [*node.outputs, f"{node.outputs[0]}.scratch"]
    return encode_node(node.outputs[0], ATTENTION, DOMAIN, kept, outputs, attributes), [name for name in kept if name]


def _bits(value: float) -> int:
    """Return the bits of a float32 as an integer."""
    return int(np.float32(value).view(np.int32))
