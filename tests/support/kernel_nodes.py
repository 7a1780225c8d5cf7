"""Models of one node of our MatMul and Gather operators, run by onnxruntime, and random matrices for them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from edgelm.graph.domain import DOMAIN
from edgelm.graph.onnx_model import FLOAT, INT64, encode_node, message_class
from edgelm.kernels.custom_ops import CustomOpLibrary
from edgelm.kernels.rewrite.panel_layout import pack_codes, pack_scales, pad_bias
from edgelm.system.digest import file_sha256


def matrix(rng, fmt, size, columns):
    """Return random codes and scales of a matrix, in the layout of MatMulNBits, and a bias.

    With 5 and 6 bits the codes of a block are the low 4 bits of its weights, then the bits above.
    """
    blocks = -(-size // fmt.block_size)
    codes = rng.integers(0, 256, (columns, blocks, fmt.block_bytes), np.uint8)
    scales = (rng.normal(size=(columns, blocks)) * 0.01).astype(np.float16)
    return codes, scales, rng.normal(size=columns).astype(np.float32)


def panels(codes, fmt):
    """Return codes of `matrix` in panels."""
    if not fmt.high_bits:
        return pack_codes(codes, fmt.bits)
    low, high = np.split(codes, [fmt.block_size // 2], axis=-1)
    return pack_codes(low, fmt.bits, high)


def inputs(rng, rows, size):
    """Return activations of very different sizes, some of them 0."""
    x = rng.normal(size=(rows, size)) * 10.0 ** rng.integers(-6, 6, (rows, 1))
    x[rng.random((rows, size)) < 0.1] = 0
    x[rng.random(rows) < 0.1] = 0
    return x.astype(np.float32)


def one_node(fmt, names, attributes):
    """Return an encoded model of one MatMul node."""
    node = encode_node("one", fmt.matmul_op_type, DOMAIN, names, ["y", "scratch"], attributes)
    return model_of(node, dict.fromkeys(names, FLOAT))


def model_of(node, inputs, outputs=("y",), domains=("edgelm",)):
    """Return an encoded model of one node; `inputs` maps its inputs to their types, all outputs are float32."""
    model = message_class("ModelProto")()
    model.MergeFromString(b"\x08\x08")  # ir_version 8
    for domain, version in {"": 18, **dict.fromkeys(domains, 1)}.items():
        model.opset_import.add(domain=domain, version=version)
    model.graph.name = "one"
    model.graph.node.add().MergeFromString(node)
    for values, types in ((model.graph.input, inputs), (model.graph.output, dict.fromkeys(outputs, FLOAT))):
        for name, dtype in types.items():
            values.add(name=name).type.tensor_type.elem_type = dtype
    return model.SerializeToString()


def product(
    library, fmt, size, codes, scales, *, bias=None, norm=None, epsilon=0.0, gated=False, skip=False, threads=2
):
    """Load a model of one MatMul node for a matrix in the layout of MatMulNBits; `skip`: whether it has that input."""
    columns, blocks = scales.shape
    attributes = {"K": size, "N": columns, "GATED": int(gated), "EPSILON": int(np.float32(epsilon).view(np.int32))}
    pieces = {"WEIGHTS": panels(codes, fmt), "SCALES": pack_scales(scales)}
    if bias is not None:
        pieces["BIAS"] = pad_bias(bias)
    if norm is not None:
        pieces["NORM"] = np.concatenate([norm, np.zeros(blocks * fmt.block_size - size, np.float32)])
    model = one_node(fmt, ["x", "skip"] if skip else ["x"], attributes | data_offsets(pieces))
    return session_of(library, fmt, model, pieces, threads)


def gather_rows(library, fmt, codes, scales, indices):
    """Return rows of a table: indices int64 [...] -> float32 [..., blocks * block_size]."""
    columns, blocks = scales.shape
    pieces = {"WEIGHTS": panels(codes, fmt), "SCALES": pack_scales(scales)}
    attributes = {"K": blocks * fmt.block_size, "N": columns} | {
        name: offset for name, offset in data_offsets(pieces).items() if name in pieces
    }
    node = encode_node("one", fmt.gather_op_type, DOMAIN, ["x"], ["y"], attributes)
    return run(session_of(library, fmt, model_of(node, {"x": INT64}), pieces, 1), indices)


def data_offsets(pieces):
    """Return the offset of each array in the data file; -1 for absent ones."""
    offsets, end = dict.fromkeys(("BIAS", "NORM", "WEIGHTS", "SCALES"), -1), 0
    for name, piece in pieces.items():
        offsets[name] = end
        end += -(-piece.nbytes // 64) * 64
    return offsets


def session_of(library, fmt, model, pieces, threads):
    """Load a model whose data file holds these arrays, each at a multiple of 64 bytes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.write_bytes(b"".join(piece.tobytes() + bytes(-piece.nbytes % 64) for piece in pieces.values()))
        CustomOpLibrary(library, [fmt], data, file_sha256(library)).register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session, x, skip=None):
    """Return the output of a node for x [..., K]."""
    return session.run(["y"], {"x": x} if skip is None else {"x": x, "skip": skip})[0]
