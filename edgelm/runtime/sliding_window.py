"""Sliding windows on old runtimes: the same graph, whatever onnxruntime means by `local_window_size`.

Bundles say how many positions a query sees, its own included, as onnxruntime does from 1.24 on. Before (its pull
request 25927, "Fix Local Attention off by 1 bug") one more was seen.
"""

from __future__ import annotations

from typing import Final

from edgelm.graph.onnx_model import change_attribute

ATTRIBUTE: Final = "local_window_size"


def has_windows(model: bytes) -> bool:
    """Tell whether a model may have a sliding window."""
    return ATTRIBUTE.encode() in model


def shrink_sliding_windows(model: bytes) -> bytes:
    """Return the model with every window one position smaller. Raises `ValueError` for what is no model."""
    return change_attribute(model, ATTRIBUTE, lambda size: size - 1)
