"""Single nodes of the kernels' operators, run by onnxruntime."""

from __future__ import annotations

import onnxruntime as ort

from edgelm.native.formats import DOMAIN
from edgelm.native.onnx_model import FLOAT, FLOAT16, UINT8, encode_node
from edgelm.native.packing import packed_bias, packed_codes, packed_scales
from edgelm.protobuf import BYTES, VARINT, message


def value_info(name, dtype):
    """A ValueInfoProto of a tensor of any shape."""
    return message([(1, BYTES, name.encode()), (2, BYTES, message([(1, BYTES, message([(1, VARINT, dtype)]))]))])


def session_of(operators, form, size, columns, *, bias=False, gated=False, threads=2):
    """Load a model of one node whose matrix is an input like the activations."""
    inputs = {"x": FLOAT, "weights": UINT8, "scales": FLOAT16} | ({"bias": FLOAT} if bias else {})
    attributes = {"K": size, "N": columns, "GATED": int(gated)}
    node = encode_node(form.operator, DOMAIN, list(inputs), ["y", "scratch"], attributes)
    graph = [(1, BYTES, node), (2, BYTES, b"one")]
    graph += [(11, BYTES, value_info(name, dtype)) for name, dtype in inputs.items()]
    graph += [(12, BYTES, value_info("y", FLOAT))]
    opsets = [message([(1, BYTES, domain), (2, VARINT, version)]) for domain, version in ((b"", 18), (b"edgelm", 1))]
    model = message([(1, VARINT, 8), *((8, BYTES, opset) for opset in opsets), (7, BYTES, message(graph))])
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    operators.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session, x, codes, scales, bits, bias=None):
    """x [..., K] times a matrix as MatMulNBits stores it."""
    feeds = {"x": x, "weights": packed_codes(codes, bits), "scales": packed_scales(scales)}
    if bias is not None:
        feeds["bias"] = packed_bias(bias)
    return session.run(["y"], feeds)[0]
