"""Converts a decoder's graph to an int8 KV cache: one scale for each channel of a head, for all positions.

onnxruntime's attention kernel rounds keys and values when it writes them, to nearest and symmetrically, and multiplies
by the scales when it reads them. The keys and values of the current step are rounded too, so that an answer does not
depend on the chunks of its prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

MIN_ONNXRUNTIME: Final = "1.28"
"""onnxruntime 1.27 has the kernel, but gives wrong results for rows of different lengths in one batch."""

PAST_KEY_INPUT: Final = 3
"""Index of GroupQueryAttention's input for the layer's past keys."""

KEY_SCALE_INPUT: Final = 12
"""Index of its first input for scales: those of keys; those of values follow."""


@dataclass(frozen=True, slots=True)
class CacheScales:
    """The value of code 1 for each channel of a layer, float32 [kv_heads, head_size], positive."""

    key: NDArray[np.float32]
    value: NDArray[np.float32]


def convert_cache_to_int8(model: ModelProto, scales: Sequence[CacheScales]) -> ModelProto:
    """Change a decoder's graph to keep keys and values as int8, with one entry of `scales` per layer; return it."""
    graph = model.graph
    for node in graph.node:
        if node.op_type != "GroupQueryAttention":
            continue
        i = int(node.input[PAST_KEY_INPUT].split(".")[1])
        node.input.extend([""] * (KEY_SCALE_INPUT - len(node.input)))
        for part, values in (("key", scales[i].key), ("value", scales[i].value)):
            name = f"layer.{i}.{part}.scale"
            graph.initializer.append(numpy_helper.from_array(values[None, :, None, :], name))
            node.input.append(name)
            node.attribute.append(helper.make_attribute(f"{part[0]}_quant_type", "PER_CHANNEL"))
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.INT8
    return model
