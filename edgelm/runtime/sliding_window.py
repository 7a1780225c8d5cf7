"""Adapts sliding windows to old versions of onnxruntime.

In a bundle, `local_window_size` is the number of positions that a query attends to, its own included, as in onnxruntime
since 1.24. Older versions attend to one position more (pull request 25927, "Fix Local Attention off by 1 bug").
"""

from __future__ import annotations

from typing import Final

from edgelm.graph.onnx_model import change_attribute

ATTRIBUTE: Final = "local_window_size"


def has_windows(model: bytes) -> bool:
    """Return whether a model may have a sliding window."""
    return ATTRIBUTE.encode() in model


def shrink_sliding_windows(model: bytes) -> bytes:
    """Return the model with every window one position smaller. Raises `ValueError` if it is not an ONNX model."""
    return change_attribute(model, ATTRIBUTE, lambda size: size - 1)
