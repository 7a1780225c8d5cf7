"""Checkpoints that were published quantized: dequantized, or refused with advice."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
from edgelm_export.checkpoint import open_checkpoint
from edgelm_export.checkpoint.published_quantization import guess_unquantized_name
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_packing import float8_value, pack_awq, pack_gptq, scaled_bytes, unpacked
from tiny import TinyLlama, save_tensors, write_json

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import CheckpointError

SHAPE = TinyLlama(mlp=96)
MATRICES = [name for name, value in SHAPE.tensors().items() if value.ndim == 2 and "embed" not in name]


def write(folder, settings_, tensors, kept=None, types=None):
    """A checkpoint with these quantized tensors beside the small model's own others."""
    import torch
    from safetensors.torch import save_file

    TinyLlama().write(folder)
    (folder / "model.safetensors").unlink()
    write_json(folder / "config.json", {**SHAPE.config(), "quantization_config": settings_})
    replaced = {name.rsplit(".", 1)[0] for name in tensors}
    whole = {name: value for name, value in SHAPE.tensors().items() if name.removesuffix(".weight") not in replaced}
    stored = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in {**whole, **tensors}.items()}
    for name, value in stored.items():
        if value.dtype == torch.uint8:
            stored[name] = value.view(torch.float8_e4m3fn)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def gptq_layer(rng, shape, bits, size, *, act_order=False, v2=False):
    """Random codes of a matrix: the stored tensors, and the dequantized matrix."""
    outputs, inputs = shape
    groups = -(-inputs // size)
    codes = rng.integers(0, 2**bits, (outputs, inputs))
    zeros = rng.integers(0, 2**bits, (groups, outputs))
    scales = rng.uniform(0.002, 0.02, (groups, outputs)).astype(np.float16)
    group_of = [k // size for k in range(inputs)]
    if act_order:
        rng.shuffle(group_of)
    return pack_gptq(codes, zeros, scales, bits, group_of, v2=v2), unpacked(codes, zeros, scales, group_of)


def all_layers(make):
    """Tensors of every matrix of the model, and the matrices, by `make(shape)`."""
    tensors, expected = {}, {}
    for name in MATRICES:
        base = name.removesuffix(".weight")
        packed, expected[name] = make(SHAPE.tensors()[name].shape)
        tensors |= {f"{base}.{part}": value for part, value in packed.items()}
    return tensors, expected


def check(folder, expected):
    """Check that every matrix, whole and in rows, equals the packer's input, and so does the export."""
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.names) == set(SHAPE.tensors())
    for name, weight in expected.items():
        assert np.array_equal(checkpoint.tensor(name, weight.shape), weight), name
        for start, stop in ((0, 1), (3, 11), (8, 16), (len(weight) - 5, len(weight)), (7, 7)):
            part = checkpoint.tensor(name, weight.shape, slice(start, stop))
            assert np.array_equal(part, weight[start:stop]), (name, start, stop)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
def test_gptq(tmp_path, bits, v2, act_order):
    rng = np.random.default_rng(bits)
    tensors, expected = all_layers(lambda shape: gptq_layer(rng, shape, bits, 16, act_order=act_order, v2=v2))
    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    settings_ = {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": act_order, "sym": False, **form}
    check(write(tmp_path / "c", settings_, tensors), expected)


def test_gptq_without_an_index_and_with_one_group(tmp_path):
    rng = np.random.default_rng(0)
    tensors, expected = all_layers(lambda shape: gptq_layer(rng, shape, 4, shape[1]))
    tensors = {name: value for name, value in tensors.items() if not name.endswith("g_idx")}
    settings_ = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    check(write(tmp_path / "c", settings_, tensors), expected)


@pytest.mark.parametrize("size", [32, -1])
def test_awq(tmp_path, size):
    rng = np.random.default_rng(1)

    def make(shape):
        outputs, inputs = shape
        step = inputs if size == -1 else size
        codes = rng.integers(0, 16, shape)
        zeros = rng.integers(0, 16, (inputs // step, outputs))
        scales = rng.uniform(0.002, 0.02, zeros.shape).astype(np.float16)
        return pack_awq(codes, zeros, scales), unpacked(codes, zeros, scales, [k // step for k in range(inputs)])

    tensors, expected = all_layers(make)
    settings_ = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True, "version": "gemm"}
    check(write(tmp_path / "c", settings_, tensors), expected)


def test_the_value_of_each_byte():
    from edgelm_export.checkpoint.published_quantization import FLOAT8_VALUES

    for byte in range(256):
        assert FLOAT8_VALUES[byte] == float8_value(byte) or (
            np.isnan(FLOAT8_VALUES[byte]) and np.isnan(float8_value(byte))
        )


FLOAT8_FORMS = {
    "block": ({"quant_method": "fp8", "weight_block_size": [32, 48]}, "weight_scale_inv", (32, 48), lambda s: s),
    "one scale": ({"quant_method": "fp8"}, "weight_scale", None, lambda s: s.reshape(())),
    "one scale in a list": ({"quant_method": "fp8"}, "weight_scale", None, lambda s: s.reshape(1)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, "weight_scale", (1, None), lambda s: s),
    "a scale a row": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "weight_scale",
        (1, None),
        lambda s: s.reshape(-1),
    ),
    "no configuration": (None, "weight_scale", None, lambda s: s.reshape(())),
}


@pytest.mark.parametrize("name", FLOAT8_FORMS)
def test_float8(tmp_path, name):
    settings_, part, block, shaped = FLOAT8_FORMS[name]
    rng = np.random.default_rng(2)

    def make(shape):
        rows, columns = shape if block is None else (block[0], block[1] or shape[1])
        codes = rng.integers(0, 0x7F, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << np.uint8(7))
        scales = rng.uniform(1e-4, 1e-3, (-(-shape[0] // rows), -(-shape[1] // columns))).astype(np.float32)
        return {"weight": codes, part: shaped(scales)}, scaled_bytes(codes, scales, (rows, columns))

    tensors, expected = all_layers(make)
    tensors |= {f"{name.removesuffix('.weight')}.input_scale": np.ones(1, np.float32) for name in MATRICES}
    check(write(tmp_path / "c", settings_, tensors), expected)


def test_int8_matrices_of_compressed_tensors(tmp_path):
    rng = np.random.default_rng(3)

    def make(shape):
        codes = rng.integers(-128, 128, shape).astype(np.int8)
        scales = rng.uniform(1e-4, 1e-3, (shape[0], 1)).astype(np.float32)
        return {"weight": codes, "weight_scale": scales}, codes.astype(np.float32) * scales

    tensors, expected = all_layers(make)
    check(write(tmp_path / "c", {"quant_method": "compressed-tensors", "format": "int-quantized"}, tensors), expected)


def test_an_export_equals_that_of_the_same_weights_as_floats(tmp_path):
    rng = np.random.default_rng(4)
    tensors, expected = all_layers(lambda shape: gptq_layer(rng, shape, 4, 32))
    quantized = write(tmp_path / "quantized", {"quant_method": "gptq", "bits": 4, "group_size": 32}, tensors)
    plain = SHAPE.write(tmp_path / "plain")
    save_tensors(plain, {**SHAPE.tensors(), **expected})
    for source in (quantized, plain):
        edgelm_export.export(source, tmp_path / f"{source.name}-out", quant="int4")
    one, other = (open_bundle(tmp_path / f"{name}-out") for name in ("quantized", "plain"))
    assert one.manifest.weights_digest == other.manifest.weights_digest
    (note,) = one.manifest.notes
    assert "GPTQ, 4 bits" in note
    assert other.manifest.notes == ()
    with edgelm.load(one.path, threads=1) as model:
        assert model.generate("Once", max_tokens=2, ignore_eos=True).tokens


def test_settings_in_a_separate_file(tmp_path):
    rng = np.random.default_rng(5)
    tensors, expected = all_layers(lambda shape: gptq_layer(rng, shape, 4, 32))
    folder = write(tmp_path / "c", None, tensors)
    with pytest.raises(CheckpointError, match=r"\*\.qweight.*quantization_config"):
        open_checkpoint(folder)
    write_json(folder / "quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False, "sym": True})
    check(folder, expected)


@settings(max_examples=50)
@given(
    shape=st.tuples(st.integers(1, 5).map(lambda n: 8 * n), st.integers(1, 5).map(lambda n: 8 * n)),
    size=st.sampled_from([8, 16, 24]),
    seed=st.integers(0, 2**32 - 1),
    rows=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_rows_of_any_shape(shape, size, seed, rows):
    """The layout alone, without files, for all ranges of rows."""
    from edgelm_export.checkpoint.published_quantization import GptqLayout

    packed, weight = gptq_layer(np.random.default_rng(seed), shape, 4, size, act_order=True)
    start, stop = sorted(min(row, shape[0]) for row in rows)
    found = GptqLayout(InMemory(packed), 4, size, 1).rows("m", shape, slice(start, stop))
    assert np.array_equal(found, weight[start:stop])


class InMemory:
    """`Stored` over arrays of one matrix `m`."""

    def __init__(self, parts):
        self.arrays = {f"m.{name}": value for name, value in parts.items()}
        self.names = list(self.arrays)

    def layout(self, name):
        kinds = {"int32": "I32", "float16": "F16"}
        return kinds[self.arrays[name].dtype.name], self.arrays[name].shape

    def read(self, name, rows=None, columns=None):
        array = self.arrays[name][rows or slice(None)]
        return array if columns is None else array[:, columns]

    def tensor(self, name, shape, rows=None):
        assert self.arrays[name].shape == shape
        return self.arrays[name].astype(np.float32)


# --- refused ---

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
REFUSED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "'bitsandbytes'"),
    ({"load_in_8bit": True}, "'bitsandbytes'"),
    ({"quant_method": "eetq"}, "'eetq'"),
    ({"quant_method": "hqq"}, "'hqq'"),
    ({"quant_method": "aqlm"}, "'aqlm'"),
    ({"quant_method": "exl2", "bits": 4.0}, "'exl2'"),
    ({"quant_method": "mxfp4"}, "'mxfp4'"),
    ({"bits": 4}, "no quant_method"),
    ({**GPTQ, "bits": 3}, "bits 3"),
    ({**GPTQ, "bits": None}, "bits None"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin'"),
    ({**GPTQ, "is_marlin_format": True}, "'marlin'"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
    ({"quant_method": "awq", "bits": 8}, "bits 8"),
    ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
    (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "sparsity_config": {"format": "sparse-24"}},
        "'sparse-24'",
    ),
    ({**GPTQ, "group_size": 0}, "group_size"),
    ({**GPTQ, "group_size": "all"}, "group_size"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size"),
    ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size"),
    ("gptq", "'gptq'"),
]


@pytest.mark.parametrize(("settings_", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_unsupported_formats_are_refused_with_advice(tmp_path, settings_, message):
    folder = SHAPE.write(tmp_path / "Tiny-Llama-Instruct-bnb-4bit")
    write_json(folder / "config.json", {**SHAPE.config(), "quantization_config": settings_})
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(folder)
    line = str(raised.value)
    assert message in line
    assert "quantization_config" in line
    assert "\n" not in line
    assert len(line) < 400 + len(str(folder))
    if " must be " not in line:
        assert "Tiny-Llama-Instruct" in line.replace(str(folder), "")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weight.quant_state.bitsandbytes__nf4", "quantization_config: bitsandbytes"),
        ("biases", "quantization_config: MLX"),
    ],
)
def test_a_format_recognized_by_tensor_names(tmp_path, part, message):
    folder = SHAPE.write(tmp_path / "Tiny-4bit")
    save_tensors(folder, {**SHAPE.tensors(), f"model.layers.0.mlp.up_proj.{part}": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=rf"{message}.*Tiny"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("Qwen2.5-0.5B-Instruct-GPTQ-Int4", "Qwen2.5-0.5B-Instruct"),
        ("Qwen2.5-0.5B-Instruct-AWQ", "Qwen2.5-0.5B-Instruct"),
        ("Llama-3.2-1B-Instruct-bnb-4bit", "Llama-3.2-1B-Instruct"),
        ("Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "Llama-3.2-1B-Instruct"),
        ("Mistral-7B-v0.1-GPTQ", "Mistral-7B-v0.1"),
        ("Llama-3.2-1B-Instruct-FP8-dynamic", "Llama-3.2-1B-Instruct"),
        ("Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "Meta-Llama-3.1-8B-Instruct"),
        ("Qwen3-0.6B-FP8", "Qwen3-0.6B"),
        ("gemma-3-1b-it-4bit", "gemma-3-1b-it"),
        ("SmolLM2-135M", None),
    ],
)
def test_the_unquantized_name_is_guessed(tmp_path, name, bare):
    assert guess_unquantized_name(tmp_path / name, {}) == bare
    hub = tmp_path / f"models--owner--{name}" / "snapshots" / "0123"
    assert guess_unquantized_name(hub, {}) == (None if bare is None else f"owner/{bare}")
    found = guess_unquantized_name(tmp_path / "my-folder", {"_name_or_path": f"owner/{name}"})
    assert found == f"owner/{bare or name}"


def damaged(change, kind="gptq"):
    rng = np.random.default_rng(6)
    if kind == "gptq":
        tensors, _ = all_layers(lambda shape: gptq_layer(rng, shape, 4, 32))
    else:
        tensors, _ = all_layers(
            lambda shape: (
                {"weight": np.full(shape, 0x38, np.uint8), "weight_scale": np.ones((shape[0], 1), np.float32)},
                None,
            )
        )
    base = MATRICES[0].removesuffix(".weight")
    change(tensors, base)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, b: t.update({f"{b}.qweight": t[f"{b}.qweight"][:-1]}), "qweight"),
        (lambda t, b: t.update({f"{b}.qweight": t[f"{b}.qweight"].astype(np.int64)}), "qweight"),
        (lambda t, b: t.update({f"{b}.qzeros": t[f"{b}.qzeros"][:, :-1]}), "qzeros"),
        (lambda t, b: t.pop(f"{b}.qzeros"), "qzeros"),
        (lambda t, b: t.update({f"{b}.scales": t[f"{b}.scales"][:1]}), "scales"),
        (lambda t, b: t.update({f"{b}.scales": t[f"{b}.scales"] * np.float16(np.nan)}), "scales"),
        (lambda t, b: t.update({f"{b}.g_idx": t[f"{b}.g_idx"][:-1]}), "g_idx"),
        (lambda t, b: t.update({f"{b}.g_idx": t[f"{b}.g_idx"] + 7}), "g_idx"),
        (lambda t, b: t.update({f"{b}.g_idx": t[f"{b}.g_idx"] - 1}), "g_idx"),
        (lambda t, b: t.update({f"{b}.g_idx": t[f"{b}.g_idx"].astype(np.float32)}), "g_idx"),
    ],
)
def test_hostile_gptq(tmp_path, change, message):
    folder = write(tmp_path / "c", GPTQ, damaged(change))
    with pytest.raises(CheckpointError, match=message):
        edgelm_export.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, b: t.pop(f"{b}.weight_scale"), "weight_scale"),
        (lambda t, b: t.update({f"{b}.weight_scale": np.ones((3, 5), np.float32)}), "weight_scale"),
        (lambda t, b: t.update({f"{b}.weight_scale": np.full((1,), np.inf, np.float32)}), "weight_scale"),
        (lambda t, b: t.update({f"{b}.weight": np.full(SHAPE.tensors()[f"{b}.weight"].shape, 0x7F, np.uint8)}), "NaN"),
        (lambda t, b: t.update({f"{b}.weight": t[f"{b}.weight"][:-1]}), "weight"),
    ],
)
def test_hostile_float8(tmp_path, change, message):
    folder = write(tmp_path / "c", {"quant_method": "fp8"}, damaged(change, "fp8"))
    with pytest.raises(CheckpointError, match=message):
        edgelm_export.export(folder, tmp_path / "out")


def test_an_unquantized_matrix_in_a_quantized_checkpoint(tmp_path):
    rng = np.random.default_rng(7)
    tensors, expected = all_layers(lambda shape: gptq_layer(rng, shape, 4, 32))
    left = MATRICES[2]
    tensors = {name: value for name, value in tensors.items() if not name.startswith(left.removesuffix("weight"))}
    folder = write(tmp_path / "c", {**GPTQ, "modules_to_not_convert": ["v_proj"]}, tensors)
    check(folder, {**expected, left: SHAPE.tensors()[left]})
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["bits"] == 4
