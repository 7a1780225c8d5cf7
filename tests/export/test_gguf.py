"""GGUF files as checkpoints: every tensor type, split files, kept blocks, and a real model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import edgelm_export
import gguf
import numpy as np
import pytest
from edgelm_export.architectures.weights import DecoderWeights
from edgelm_export.checkpoint import GgufTensors, open_checkpoint
from edgelm_export.checkpoint import gguf as reading
from edgelm_export.checkpoint.gguf_config import _share
from edgelm_export.checkpoint.gguf_file import TYPES, GgufFile
from edgelm_export.quantize.keep import read_kept_matrix
from edgelm_export.quantize.pack import dequantize
from edgelm_export.source_model import open_source_model
from gguf import GGMLQuantizationType as Kind
from gguf_files import converted, interleaved, write_gguf
from tiny import CHAT_TEMPLATE, TinyLlama, tokenizer_json

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import CheckpointError, EdgelmError

SHAPE = TinyLlama(vocab=331, hidden=256, layers=2, heads=4, kv_heads=2, mlp=512)
"""A shape whose rows are whole blocks of 256, as K-quants require."""

QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def write(path, shape=SHAPE, **options):
    return write_gguf(path, shape.config(), shape.tensors(), **{"tokenizer": tokenizer_json(), **options})


# --- types of tensors ---


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_dequantized_as_the_library_does(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "DEQUANTIZE_CHUNK_BYTES", 40 * 256 * 4)  # so that a matrix has several chunks
    file = write(tmp_path / "model.gguf", kind=Kind[kind])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}

    def expected(name):
        return gguf.dequantize(stored[name].data, stored[name].tensor_type).reshape(-1, 256)

    checkpoint = open_checkpoint(file)
    assert stored["blk.0.attn_q.weight"].tensor_type == Kind[kind]
    embedding, whole = "model.embed_tokens.weight", expected("token_embd.weight")
    assert np.array_equal(checkpoint.tensor(embedding, whole.shape), whole)
    assert np.array_equal(checkpoint.tensor(embedding, whole.shape, slice(37, 201)), whole[37:201])
    for name, theirs, heads in ((QUERY, "blk.0.attn_q.weight", 4), (KEY, "blk.0.attn_k.weight", 2)):
        rows = expected(theirs)
        found = checkpoint.tensor(name, rows.shape)
        assert np.array_equal(interleaved(found, heads), rows)
        assert np.array_equal(checkpoint.tensor(name, rows.shape, slice(5, 70)), found[5:70])


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ1_0"])
def test_an_unsupported_tensor_type_is_refused_by_name(kind, tmp_path):
    file = write(tmp_path / "model.gguf", kinds={"ffn_down.weight": Kind[kind]})
    with pytest.raises(CheckpointError, match=rf"ffn_down.weight .*{kind}.* F32, .*IQ4_XS"):
        open_checkpoint(file)


def test_a_quantized_file_gives_logits_close_to_the_models(tmp_path, export_to_cache):
    exact = export_to_cache(write(tmp_path / "exact.gguf"), quant="fp32")
    for kind, limit in ((Kind.F16, 0.002), (Kind.BF16, 0.02), (Kind.Q8_0, 0.05), (Kind.Q5_1, 0.3)):
        bundle = export_to_cache(write(tmp_path / f"{kind.name}.gguf", kind=kind), quant="fp32")
        assert 0 < distance(bundle, exact) < limit, kind


def distance(bundle, other):
    """The difference of two bundles' logits, relative to the second's."""
    expected = logits(other)
    return np.linalg.norm(logits(bundle) - expected) / np.linalg.norm(expected)


def logits(bundle, tokens=tuple(range(7, 47))):
    with edgelm.load(bundle, threads=1, max_batch=1) as model:
        return model.worker.call(
            lambda engine: engine.runner.prefill(
                engine.scratch_row, np.array(tokens), 0, all_logits=True, final_length=len(tokens)
            )
        )


# --- metadata ---


def test_the_manifest_has_the_metadata_of_the_file(tmp_path, export_to_cache):
    file = write(
        tmp_path / "model.gguf",
        metadata={
            "tokenizer.chat_template": CHAT_TEMPLATE,
            "tokenizer.ggml.eot_token_id": 300,
            "general.sampling.temp": 0.5,
            "general.sampling.top_k": 20,
            "general.sampling.top_p": 0.9,
            "general.sampling.penalty_repeat": 1.1,
        },
    )
    manifest = open_bundle(export_to_cache(file, quant="int8")).manifest
    assert manifest.architecture == "llama"
    assert (manifest.bos_token, manifest.eos_tokens) == (0, (1, 300))
    assert manifest.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert manifest.chat_template == CHAT_TEMPLATE
    sampling = manifest.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 20, 0.9)
    assert sampling.repetition_penalty == 1.1
    assert manifest.made_with["gguf"]


def test_sampling_that_the_file_does_not_mention_is_greedy(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "model.gguf"))
    assert not checkpoint.generation_config.get("do_sample")
    file = write(tmp_path / "cold.gguf", metadata={"general.sampling.temp": 0.0})
    assert open_checkpoint(file).generation_config["do_sample"] is False


def test_float32_numbers_are_read_as_they_were_configured(tmp_path):
    config = open_checkpoint(write(tmp_path / "model.gguf")).config
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 10000.0)


def test_granites_multipliers_have_defaults(tmp_path):
    names = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
    config = {**SHAPE.config(), "model_type": "granite", **dict.fromkeys(names, 0.0)}
    file = write_gguf(tmp_path / "model.gguf", config, SHAPE.tensors(), tokenizer=tokenizer_json())
    found = open_checkpoint(file).config
    assert [found[name] for name in names] == [64**-0.5, 1.0, 1.0, 1.0]


def test_the_partial_rotary_factor_gives_the_rotary_size():
    for head_size in range(2, 300):
        for size in range(2, head_size + 1, 2):
            assert int(head_size * _share(size, head_size)) == size


# --- split files ---


@pytest.fixture
def parts(tmp_path):
    """A model in three files."""
    shape = TinyLlama()
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=8)
    write_gguf(path, shape.config(), shape.tensors(), tokenizer=tokenizer_json(), writer=writer)
    found = sorted(tmp_path.glob("model-*.gguf"))
    assert len(found) == 3
    return found


def test_a_split_file_is_read_by_its_first_part(parts, tmp_path):
    whole, split = open_checkpoint(write(tmp_path / "whole.gguf", TinyLlama())), open_checkpoint(parts[0])
    assert split.config == whole.config
    assert split.names == whole.names
    for name, value in TinyLlama().tensors().items():
        assert np.array_equal(split.tensor(name, value.shape), value)


def test_the_error_for_another_part_names_the_first(parts):
    with pytest.raises(CheckpointError, match=f"3 parts.*{parts[0].name}"):
        open_checkpoint(parts[1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda parts: parts[1].unlink(), "00002-of-00003.gguf"),
        (lambda parts: shutil.copy(parts[1], parts[2]), "00003-of-00003.gguf.* 3 of 3"),
        (lambda parts: parts[0].rename(parts[0].with_name("other.gguf")), "3 parts.*00001-of-00003"),
    ],
    ids=["missing", "twice", "renamed"],
)
def test_missing_and_wrong_parts_are_refused(spoil, message, parts):
    first = parts[0]
    spoil(parts)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(first if first.exists() else first.with_name("other.gguf"))


# --- blocks as they are ---


def kept_and_stored(file):
    """Yield each kept matrix's name, the bundle's values, and the file's."""
    model = open_source_model(file)
    weights = DecoderWeights(model.checkpoint, model.decoder, model.weights.tensor_names)
    for name, rows in weights.matrices():
        kinds = {model.checkpoint.tensors.kind(part) for part in model.checkpoint.names if _is_part(part, name)}
        if len(kinds) == 1 and kinds <= {"Q4_0", "Q8_0"}:
            yield name, dequantize(read_kept_matrix(weights, name)), rows.read_all()


def _is_part(tensor, matrix):
    ends = {"qkv": ("q_proj.weight", "k_proj.weight", "v_proj.weight"), "output": ("o_proj.weight",)}
    ends |= {"gate_up": ("gate_proj.weight", "up_proj.weight"), "down": ("down_proj.weight",)}
    if matrix in ("embedding", "head"):
        return tensor == {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}[matrix]
    _, i, part = matrix.split(".")
    return tensor.startswith(f"model.layers.{i}.") and tensor.endswith(ends[part])


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_kept_blocks_equal_those_of_the_file(kind, tmp_path, export_to_cache):
    file = write(tmp_path / "model.gguf", TinyLlama(tied=False), kind=kind)
    found = list(kept_and_stored(file))
    assert len(found) == 10  # two tables and two layers of four
    for name, ours, theirs in found:
        assert np.array_equal(ours, theirs), name
    manifest = open_bundle(export_to_cache(file, quant="keep")).manifest
    assert manifest.quant == ("int4" if kind == Kind.Q4_0 else "int8")
    assert {matrix.method for matrix in manifest.matrices} == {"keep"}
    assert manifest.bits_per_weight == (4.5 if kind == Kind.Q4_0 else 8.5)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_blocks_without_a_scale_are_zeros(kind, tmp_path):
    file = write(tmp_path / "model.gguf", TinyLlama(), kind=kind)
    content, at = bytearray(file.read_bytes()), GgufFile(file).tensors["token_embd.weight"].offset
    for i in (0, 3):  # scales of 0, which a bundle may not have
        start = at + i * gguf.GGML_QUANT_SIZES[kind][1]
        content[start : start + 2] = np.float16([0.0, -0.0][i > 0]).tobytes()
    file.write_bytes(content)
    weights = open_source_model(file).weights
    packed, expected = read_kept_matrix(weights, "embedding"), weights.embedding().read_all()
    assert not expected[0, :32].any()
    assert not expected[1, 32:].any()
    assert np.array_equal(dequantize(packed), expected)
    assert packed.scales.all()


def test_kept_blocks_give_the_logits_of_the_dequantized_model(tmp_path, export_to_cache):
    file = write(tmp_path / "model.gguf", kind=Kind.Q8_0)
    apart = distance(export_to_cache(file, quant="keep"), export_to_cache(file, quant="fp32"))
    assert apart < 0.05  # activations are rounded to int8 too


def test_matrices_in_other_formats_are_rounded_to_int8(tmp_path, run):
    kinds = {"0.ffn_up.weight": Kind.Q4_1, "token_embd.weight": Kind.Q6_K}
    file = write(tmp_path / "model.gguf", kind=Kind.Q4_0, kinds=kinds)
    code, printed, error = run("export", file, tmp_path / "out", "--quant", "keep")
    assert code == 0, error
    assert "7 of 9" in printed
    assert "embedding, layer.0.gate_up" in printed
    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.quant == "mixed"
    stored = {matrix.name: (matrix.bits, matrix.method) for matrix in manifest.matrices}
    assert stored["embedding"] == stored["layer.0.gate_up"] == (8, "rtn")
    assert stored["layer.0.qkv"] == (4, "keep")


def test_granites_multiplier_is_part_of_the_scales(tmp_path, export_to_cache):
    config = {
        **SHAPE.config(),
        "model_type": "granite",
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
    }
    file = write_gguf(tmp_path / "model.gguf", config, SHAPE.tensors(), kind=Kind.Q4_0, tokenizer=tokenizer_json())
    for name, ours, theirs in kept_and_stored(file):
        assert np.allclose(ours, theirs, rtol=3e-7, atol=0), name
    outline = edgelm_export.outline(file, quant="keep")
    manifest = open_bundle(export_to_cache(file, quant="keep")).manifest
    assert outline.matrices == manifest.matrices
    assert {matrix.scale_bits for matrix in manifest.matrices} == {16, 32}


def test_a_pruned_vocabulary_keeps_the_rows_blocks(tmp_path):
    text = tmp_path / "domain.txt"
    text.write_text("turn off the light in the kitchen please\n" * 40)
    file = write(tmp_path / "model.gguf", kind=Kind.Q8_0)
    edgelm_export.export(file, tmp_path / "out", quant="keep", vocab=text, vocab_size=300)
    kept = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    model = open_source_model(file)
    small = edgelm_export.source_model.with_vocabulary(model, np.array(kept))
    found = dequantize(read_kept_matrix(small.weights, "embedding"))
    assert np.array_equal(found, model.weights.embedding().read_all()[kept])


@pytest.mark.parametrize(("kind", "message"), [(Kind.Q4_1, "Q4_0.*Q8_0.*Q4_1"), (Kind.F32, "F32")], ids=["Q4_1", "F32"])
def test_a_file_without_blocks_to_keep_is_refused(kind, message, tmp_path):
    file = write(tmp_path / "model.gguf", kind=kind)
    with pytest.raises(EdgelmError, match=message):
        edgelm_export.export(file, tmp_path / "out", quant="keep")
    assert not (tmp_path / "out").exists()


def test_a_hugging_face_checkpoint_has_nothing_to_keep(tiny_checkpoint, tmp_path):
    with pytest.raises(EdgelmError, match="GGUF"):
        edgelm_export.export(tiny_checkpoint(), tmp_path / "out", quant="keep")


@pytest.mark.parametrize(
    "options",
    [{"block_size": 64}, {"symmetric": False}, {"method": "hqq"}, {"adapter": "x"}, {"via": "optimum"}],
    ids=str,
)
def test_options_that_would_change_the_blocks_are_refused(options, tmp_path):
    with pytest.raises(EdgelmError, match="--quant keep"):
        edgelm_export.export(tmp_path / "model.gguf", tmp_path / "out", quant="keep", **options)


# --- the command, and what is not a model ---


def test_a_directory_with_a_gguf_file_names_the_file(tmp_path):
    write(tmp_path / "model.gguf", TinyLlama())
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        open_checkpoint(tmp_path)


def test_optimum_takes_no_gguf(tmp_path):
    file = write(tmp_path / "model.gguf", TinyLlama())
    with pytest.raises(CheckpointError, match=r"--via optimum.*Hugging Face"):
        edgelm_export.export(file, tmp_path / "out", via="optimum", quant="int8")


def test_the_library_is_loaded_only_for_gguf(tiny_checkpoint):
    code = (
        "import sys; from edgelm_export.checkpoint import open_checkpoint;"
        f"open_checkpoint({str(tiny_checkpoint())!r}); assert 'gguf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- a real model ---


def test_the_real_models_weights_equal_those_of_transformers(smollm2_gguf):
    transformers = pytest.importorskip("transformers", reason="needs pip install 'edgelm[distill]'")
    pytest.importorskip("torch", reason="needs pip install 'edgelm[distill]'")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    checkpoint, named = open_checkpoint(smollm2_gguf), dict(loaded.named_parameters())
    assert set(checkpoint.names) == set(named)
    for name in ("model.embed_tokens.weight", "model.norm.weight", QUERY, KEY, "model.layers.29.mlp.down_proj.weight"):
        value = named[name].detach().float().numpy()
        assert np.array_equal(checkpoint.tensor(name, value.shape), value), name


def test_the_real_models_configuration_is_read(smollm2_gguf):
    checkpoint = open_checkpoint(smollm2_gguf)
    assert isinstance(checkpoint.tensors, GgufTensors)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.config["tie_word_embeddings"]
    assert checkpoint.generation_config["eos_token_id"] == [2, 0]
    assert checkpoint.tokenizer_config["chat_template"].startswith("{% for message in messages %}")


def test_the_real_models_kept_embedding_equals_that_of_the_file(smollm2_gguf):
    weights = open_source_model(smollm2_gguf).weights
    assert np.array_equal(dequantize(read_kept_matrix(weights, "embedding")), weights.embedding().read_all())


def test_the_tests_writer_reorders_query_rows_like_the_converter(tmp_path):
    """The queries in a file must differ from the model's; otherwise no test would cover the order of rows."""
    tensors = converted("llama", "llama", SHAPE.config(), SHAPE.tensors())
    assert not np.array_equal(tensors["blk.0.attn_q.weight"], SHAPE.tensors()[QUERY])


def test_a_gguf_file_is_known_by_its_content(tmp_path):
    file = write(tmp_path / "model.gguf", TinyLlama()).rename(tmp_path / "sha256-0123")
    assert open_checkpoint(str(file)).config["model_type"] == "llama"
