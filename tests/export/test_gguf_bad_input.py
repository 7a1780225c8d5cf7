"""Damaged, hostile and unsupported GGUF files: one error, no traceback."""

from __future__ import annotations

import struct
import subprocess
import sys
from contextlib import suppress
from itertools import count

import edgelm_export
import numpy as np
import pytest
from edgelm_export.checkpoint import open_checkpoint
from edgelm_export.checkpoint.gguf_file import GgufFile
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFEndian, GGUFWriter
from gguf_files import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TinyLlama, tokenizer_json

from edgelm.errors import CheckpointError, EdgelmError

SHAPE = TinyLlama(vocab=320, hidden=32, layers=1, heads=2, kv_heads=1, mlp=32, context=64)


def write(path, config=None, tensors=None, **options):
    config, tensors = {**SHAPE.config(), **(config or {})}, {**SHAPE.tensors(), **(tensors or {})}
    return write_gguf(path, config, tensors, tokenizer=tokenizer_json(), **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file that can be exported."""
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", kind=Kind.Q8_0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Yield new folders."""
    root = tmp_path_factory.mktemp("changed")

    def new():
        for i in count():
            (root / str(i)).mkdir()
            yield root / str(i)

    return new()


@pytest.fixture
def refused(tmp_path, run):
    """Export a file with these bytes; return the error line."""

    def export(content, name="model.gguf"):
        path = tmp_path / name
        path.write_bytes(content)
        code, printed, errors = run("export", path, tmp_path / "out", "--quant", "int8")
        assert code != 0
        assert printed == ""
        assert errors.startswith("edgelm export: ")
        assert len(errors.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()
        return errors

    return export


def header(tensors=0, entries=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def text(value):
    return struct.pack("<Q", len(value)) + value


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


# --- the container ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.gguf"),
        (b"GG", "GGUF file"),
        (b"GGUF", "truncated"),
        (b"ggjt\x03\x00\x00\x00" * 9, "GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>" * 9, "GGUF file"),
        (header(version=1), "version 1"),
        (header(version=0), "version 0"),
        (header(version=77), "version 77"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(entries=2**63), "damaged"),
        (header(tensors=2**64 - 1), "damaged"),
        (header(entries=1) + struct.pack("<Q", 2**60) + b"x" * 20, "256"),
        (header(entries=1) + entry(b"a", 8, struct.pack("<Q", 2**62)), "truncated"),
        (header(entries=1) + entry(b"a", 99, b"\0" * 8), "99"),
        (header(entries=1) + entry(b"\xff\xfe", 0, b"\0"), "printable"),
        (header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 8, 2**61)), str(2**61)),
        (header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 0, 2**61)), "truncated"),
        (header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 9, 2**61)), " 9"),
        (header(entries=2) + entry(b"a", 0, b"\0") * 2, "twice"),
        (header(), "general.architecture"),
        (header(entries=1) + entry(b"general.alignment", 4, struct.pack("<I", 0)), "general.alignment"),
        (header(entries=1) + entry(b"general.alignment", 4, struct.pack("<I", 48)), "general.alignment"),
        (header(entries=1) + entry(b"general.alignment", 4, struct.pack("<I", 2**30)), "general.alignment"),
        (header(tensors=1) + text(b"a") + struct.pack("<I", 2**31) + b"\0" * 40, "dimensions"),
        (header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 0, 0, 0) + b"\0" * 40, "damaged"),
        (header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 33, 8, 0) + b"\0" * 40, "damaged"),
        (header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 2**63, 0, 0) + b"\0" * 40, "damaged"),
        (header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 8, 0, 2**63) + b"\0" * 40, "damaged"),
        (header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 8, 0, 7) + b"\0" * 60, "damaged"),
        (header(tensors=1) + text(b"a") + struct.pack("<IQIQ", 1, 8, 1000, 0) + b"\0" * 60, "unknown type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_container_is_named(content, message, refused):
    assert message in refused(content)


def test_huge_counts_cost_neither_memory_nor_time(tmp_path):
    """A file of 64 MB with as many strings as fit is read in a child process, with little memory."""
    path = tmp_path / "model.gguf"
    strings = 8_000_000
    path.write_bytes(header(entries=1) + entry(b"a", 9, struct.pack("<IQ", 8, strings)) + bytes(8 * strings))
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        "from edgelm_export.checkpoint import open_checkpoint; from edgelm.errors import CheckpointError\n"
        f"try: open_checkpoint({str(path)!r})\n"
        "except CheckpointError as error: print(error)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # kB; getrusage inherits the parent's
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    message, peak = found.stdout.splitlines()
    assert "general.architecture" in message
    assert int(peak) < 1_500_000


def test_a_big_endian_file_of_the_library_is_named(tmp_path, refused):
    path = tmp_path / "big.gguf"
    writer = GGUFWriter(path, "llama", endianess=GGUFEndian.BIG)
    write(path, writer=writer)
    assert "big-endian" in refused(path.read_bytes())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_named(share, model, refused):
    content = model.read_bytes()
    assert "truncated" in refused(content[: int(len(content) * share)])


# --- the model ---


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "'mamba'.*gemma2, .*smollm3"),
        ({"llama.block_count": 0}, "llama.block_count"),
        ({"llama.block_count": 2**31 - 1}, "2147483647 layers"),
        ({"llama.block_count": "two"}, "llama.block_count"),
        ({"llama.block_count": [1, 2]}, "llama.block_count"),
        ({"llama.embedding_length": 2**30}, "head size|dimension_count"),
        ({"llama.attention.head_count": 2**30}, "head size|dimension_count"),
        ({"llama.attention.head_count_kv": 3}, "blk.0.attn_k.weight"),
        ({"llama.feed_forward_length": 64}, "blk.0.ffn_"),
        ({"llama.attention.key_length": 2**30}, "head size|dimension_count"),
        ({"llama.attention.value_length": 8}, "sizes"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "rms_norm_eps"),
        ({"llama.rope.freq_base": 0.0}, "rope_theta"),
        ({"llama.rope.dimension_count": 8}, "16.* 8"),
        ({"llama.rope.scaling.type": "alibi"}, "rope.scaling.type 'alibi'"),
        ({"llama.rope.scaling.type": "longrope"}, "rope_factors_long.weight"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.attention.causal": False}, "encoder"),
        ({"llama.context_length": 0}, "llama.context_length"),
        ({"split.count": 2}, "2 parts"),
        ({"tokenizer.ggml.eos_token_id": -1.5}, "tokenizer.ggml.eos_token_id"),
    ],
    ids=str,
)
def test_bad_metadata_is_refused_by_key(metadata, message, tmp_path):
    path = tmp_path / "model.gguf"
    keyed = {key: value for key, value in metadata.items() if key != "general.architecture"}
    writer = GGUFWriter(path, metadata.get("general.architecture", "llama"))
    write(path, metadata=keyed, writer=writer)
    with pytest.raises(CheckpointError, match=message):
        edgelm_export.outline(path, quant="int8")


@pytest.mark.parametrize(
    "missing",
    [
        *("llama.block_count", "llama.embedding_length", "llama.attention.head_count", "llama.feed_forward_length"),
        *("llama.context_length", "llama.attention.layer_norm_rms_epsilon"),
        *("tokenizer.ggml.model", "tokenizer.ggml.tokens"),
    ],
)
def test_missing_metadata_is_named(missing, tmp_path):
    path = write(tmp_path / "model.gguf", metadata={missing: None})
    with pytest.raises(CheckpointError, match=missing):
        open_checkpoint(path)


def test_granite_without_positions_is_refused(tmp_path):
    multipliers = dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier"), 0.5)
    config = {"model_type": "granite", "logits_scaling": 2.0, **multipliers}
    path = write(tmp_path / "model.gguf", config, metadata={"granite.rope.scaling.finetuned": False})
    with pytest.raises(CheckpointError, match=r"granite.*rotary"):
        open_checkpoint(path)


def test_olmo_with_a_window_is_refused(tmp_path):
    kept = {name: value for name, value in SHAPE.tensors().items() if "layernorm" not in name}
    metadata = {"olmo2.attention.sliding_window": 64}
    config = {**SHAPE.config(), "model_type": "olmo2"}
    path = write_gguf(tmp_path / "model.gguf", config, kept, tokenizer=tokenizer_json(), metadata=metadata)
    with pytest.raises(CheckpointError, match="OLMo 3"):
        open_checkpoint(path)


def test_missing_tensors_are_named(tmp_path):
    tensors = SHAPE.tensors()
    del tensors["model.layers.0.mlp.up_proj.weight"]
    path = write_gguf(tmp_path / "model.gguf", SHAPE.config(), tensors, tokenizer=tokenizer_json())
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        edgelm_export.export(path, tmp_path / "out", quant="int8")
    del tensors["model.embed_tokens.weight"]
    path = write_gguf(tmp_path / "other.gguf", SHAPE.config(), tensors, tokenizer=tokenizer_json())
    with pytest.raises(CheckpointError, match="embedding"):
        open_checkpoint(path)


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32))
    write(path, writer=writer)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q_norm\.weight.*llama"):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16])
def test_weights_with_nan_or_infinity_are_refused_by_name(kind, value, tmp_path):
    broken = SHAPE.tensors()["model.layers.0.mlp.down_proj.weight"]
    broken[5, 7] = value
    path = write(tmp_path / "model.gguf", None, {"model.layers.0.mlp.down_proj.weight": broken}, kind=kind)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_down\.weight.*NaN"):
        edgelm_export.export(path, tmp_path / "out", quant="int8")


@pytest.mark.parametrize("quant", ["keep", "int8"])
def test_scales_with_infinity_are_refused(quant, tmp_path):
    path = write(tmp_path / "model.gguf", kind=Kind.Q4_0)
    content, at = bytearray(path.read_bytes()), GgufFile(path).tensors["blk.0.ffn_down.weight"].offset
    content[at : at + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="NaN"):
        edgelm_export.export(path, tmp_path / "out", quant=quant)


# --- anything ---


@settings(max_examples=150)
@given(data=st.data())
def test_any_change_of_a_file_gives_one_error_or_a_bundle(data, model, folders):
    content = bytearray(model.read_bytes())
    end = st.integers(0, len(content) - 1) | st.integers(0, min(len(content), 9000) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(end)
        match data.draw(st.sampled_from(["byte", "number", "cut", "remove", "repeat"])):
            case "byte":
                content[at : at + 1] = bytes([data.draw(st.integers(0, 255))])
            case "number":
                size = data.draw(st.sampled_from([4, 8]))
                number = data.draw(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
                content[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
            case "cut":
                del content[at:]
            case "remove":
                del content[at : at + data.draw(st.integers(1, 64))]
            case "repeat":
                content[at:at] = content[at : at + data.draw(st.integers(1, 64))]
        if not content:
            return
    path = next(folders) / "model.gguf"
    path.write_bytes(content)
    with suppress(OneLine):
        try:
            edgelm_export.outline(path, quant="int8")
            edgelm_export.export(path, path.with_name("out"), quant="keep")
        except EdgelmError as error:
            raise OneLine(error) from error


class OneLine(Exception):
    """An error of one line; anything else is a failure."""

    def __init__(self, error):
        super().__init__(str(error))
        if len(str(error)) > 2000 or "\n" in str(error):
            raise AssertionError(f"not one line: {str(error)[:3000]!r}")
