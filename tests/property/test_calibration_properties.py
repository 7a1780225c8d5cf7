"""Calibration of models with attention sinks and outlier channels: it never makes a matrix worse than no calibration.

Real models have a first position whose hidden state is hundreds of times larger than others', and channels that are
large at every position. Both make second moments nearly singular.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
from edgelm_export.calibration.calibrate import _inverse_mean_square
from edgelm_export.calibration.moment_sums import MomentAccumulator
from edgelm_export.checkpoint.matrix_reader import LazyMatrix
from edgelm_export.quantize.pack import dequantize
from edgelm_export.quantize.spec import QuantSpec
from edgelm_export.source_model import open_source_model
from edgelm_export.write.matrix_store import MAX_WEIGHT_GROWTH, quantize_calibrated, quantize_matrix
from safetensors.numpy import load_file, save_file

SIZES = st.sampled_from([1.0, 1e2, 1e3, 1e4])


@st.composite
def streams(draw):
    """Inputs of a matrix in both models, and the residual stream: some documents have sinks, some channels outliers."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    sink, channel, drifts = draw(SIZES), draw(SIZES), draw(st.sampled_from([0.01, 0.1, 0.3]))
    rows, columns, count, length = 24, 48, draw(st.integers(8, 20)), 24
    weight = (generator.normal(size=(rows, columns)) / columns**0.5).astype(np.float32)
    outliers = np.ones(columns)
    outliers[generator.integers(0, columns, 2)] = channel
    direction = generator.normal(size=columns)
    documents = []
    for number in range(count):
        full = generator.normal(size=(length, columns)) @ np.diag(outliers)
        if number % draw(st.integers(1, 4)) == 0:  # not every document has a sink, and they differ in size
            full[0] = sink * direction * generator.uniform(0.3, 3)
        own = full * (1 + drifts * generator.normal(size=full.shape))
        stream = full @ weight.T + generator.normal(size=(length, rows))
        drift = drifts * generator.normal(size=stream.shape) * np.abs(stream)
        documents.append([each.astype(np.float32) for each in (own, full, drift, stream)])
    return weight, documents


@settings(max_examples=60)
@given(given_streams=streams(), bits=st.sampled_from([4, 5]), adds=st.booleans())
def test_a_calibrated_matrix_is_no_worse_on_new_positions_of_the_same_kind(given_streams, bits, adds):
    weight, documents = given_streams
    sums = MomentAccumulator(weight.shape, weight)
    for number, (own, full, drift, stream) in enumerate(documents):
        weights = _inverse_mean_square(stream) if adds else None
        sums.add(own, full, drift if adds else None, weights, is_held_out=number % 4 == 3)
    moments = sums.moments()
    spec = QuantSpec(bits, 32, True, "gptq")
    packed = quantize_calibrated(LazyMatrix.from_array(weight), spec, moments, None)
    if packed is None:  # stored without calibration
        return
    plain = quantize_matrix(LazyMatrix.from_array(weight), QuantSpec(bits, 32, True, "clip"))
    held = moments.held_out
    errors = [np.square(held.inputs @ dequantize(each).T - held.target).sum() for each in (packed, plain)]
    assert errors[0] < errors[1]
    assert np.abs(dequantize(packed)).max() <= MAX_WEIGHT_GROWTH * np.abs(weight).max() * (
        1 + 1e-6
    )  # no growth from layer to layer


def with_outliers(checkpoint, out, size, layers):
    """Copy a tiny checkpoint; some channels of the residual stream become `size` times larger, its logits the same."""
    out.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix == ".json":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    channels = [3, 17]
    tensors["model.embed_tokens.weight"][:, channels] *= size
    for i in range(layers):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{i}.{part}.weight"][channels] *= size
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{part}.weight"][channels] /= size
    tensors["model.norm.weight"][channels] /= size
    # Two of 64 channels dominate the root mean square, so the others need larger factors.
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] *= np.float32(size * (2 / 64) ** 0.5)
    tensors["model.norm.weight"] *= np.float32(0.05)  # random weights give too peaked logits
    save_file(tensors, out / "model.safetensors")
    return out


@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
def test_calibration_of_a_model_with_outlier_channels(size, tiny_checkpoint, tmp_path):
    checkpoint = with_outliers(tiny_checkpoint(hidden=64, mlp=96, layers=3, tied=False), tmp_path / "outliers", size, 3)
    generator = np.random.default_rng(0)
    vocab = [token for token in open_source_model(checkpoint).tokenizer._inner.get_vocab() if token.isalpha()]
    texts = [" ".join(generator.choice(vocab, 400)) for _ in range(12)]
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(texts[:10]), encoding="utf-8")
    (tmp_path / "verify.txt").write_text("\n<|endoftext|>\n".join(texts[10:]), encoding="utf-8")
    found = {}
    for name, options in {
        "file": {"calibrate": tmp_path / "text.txt"},
        "self": {"calibrate": "self"},
        "fast": {"fast": True},
    }.items():
        bundle = edgelm_export.export(
            checkpoint, tmp_path / name, quant="int4", verify=tmp_path / "verify.txt", **options
        )
        found[name] = bundle.manifest.quality["kl_mean"]
    assert found["file"] <= 1.05 * found["fast"] + 1e-3
    assert found["self"] <= 1.1 * found["fast"] + 1e-3
