"""Models of one attention node, ours or onnxruntime's, with past and present bound to the same memory."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from kernel_nodes import model_of

from edgelm.graph.domain import DOMAIN
from edgelm.graph.onnx_model import FLOAT, encode_node
from edgelm.kernels.abi import ATTENTION

INT32, INT64 = 6, 7
TYPES = {"seqlens": INT32, "total": INT32, "positions": INT64}


def bits(value):
    return int(np.float32(value).view(np.int32))


def ours(shape, inputs):
    """Return our encoded node for a `naive_kernel_attention.Shape`; `inputs` are the names of the present inputs."""
    names = ["query", "key", "value", "past_key", "past_value", "seqlens", "cos", "sin", "positions"]
    attributes = {"HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "HALF": shape.half, "WINDOW": shape.window}
    attributes |= {"SCALE": bits(shape.scale), "SOFTCAP": bits(shape.softcap)}
    given = [name if name in inputs else "" for name in names]
    outputs = ["y", "present_key", "present_value", "scratch"]
    return encode_node("one", ATTENTION, DOMAIN, given, outputs, attributes)


def session_of(node, inputs, *, operators=None, threads=2):
    """Load a model of one node."""
    types = {name: TYPES.get(name, FLOAT) for name in inputs}
    model = model_of(node, types, ("y", "present_key", "present_value"), ("edgelm", "com.microsoft"))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if operators is not None:
        operators.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session, feeds, *, in_place=True):
    """Return the output. The KV cache in `feeds` is changed in place, or returned after the output."""
    if not in_place:
        return session.run(["y", "present_key", "present_value"], feeds)
    binding = session.io_binding()
    kept = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
    for name, value in kept.items():
        binding.bind_ortvalue_input(name, value)
    for part in ("key", "value"):
        binding.bind_ortvalue_output(f"present_{part}", kept[f"past_{part}"])
    binding.bind_output("y")
    session.run_with_iobinding(binding)
    return binding.get_outputs()[-1].numpy()
