"""Text models of multimodal checkpoints against transformers' multimodal models with text input."""

from __future__ import annotations

import json
import shutil

import families
import numpy as np
import pytest

import edgelm
from edgelm.bundle.bundle_folder import open_bundle

torch = pytest.importorskip("torch", reason="needs pip install 'edgelm[distill]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'edgelm[distill]'")

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TEXT = {name: families.BASE[name] for name in families.BASE if name.endswith(("size", "layers", "heads", "embeddings"))}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "embed_dim": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "intermediate_size": 32,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
CASES = {
    "gemma3": (
        {
            "text_config": {
                **TEXT,
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 12,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
        },
        "Gemma3ForConditionalGeneration",
    ),
    "mistral3": (
        {
            "text_config": {"model_type": "mistral", **TEXT, "head_dim": 16, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **VISION},
        },
        "Mistral3ForConditionalGeneration",
    ),
    "llava": (
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
        "LlavaForConditionalGeneration",
    ),
    "llava_next": (
        {
            "text_config": {"model_type": "mistral", **TEXT, "sliding_window": 17},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
        "LlavaNextForConditionalGeneration",
    ),
    "smolvlm": (
        {
            "text_config": {"model_type": "llama", **TEXT, "pad_token_id": 2},
            "vision_config": {"model_type": "smolvlm_vision", **VISION},
            "pad_token_id": 2,
        },
        "SmolVLMForConditionalGeneration",
    ),
    "qwen2_vl": (
        {**TEXT, **MROPE, "vision_config": QWEN_VISION, "tie_word_embeddings": True},
        "Qwen2VLForConditionalGeneration",
    ),
    "qwen2_5_vl": (
        {"text_config": {**TEXT, **MROPE}, "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]}},
        "Qwen2_5_VLForConditionalGeneration",
    ),
}


def newer(name):
    """A tensor's name in the layout of transformers 4.52 and later."""
    return name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head.", "lm_head.")


def older(name):
    """A tensor's name in the layout before."""
    name = newer(name).replace("model.language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


def made(kind, folder):
    """A random multimodal model of transformers, saved with the tests' tokenizer."""
    options, name = CASES[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **options, **TOKENS)
    network = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(-0.2, 0.5)
    return network, families.write(network, folder)


def logits(network, tokens):
    with torch.no_grad():
        return network(input_ids=torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("kind", CASES)
def test_text_is_computed_as_in_the_whole_model(kind, tmp_path, export_to_cache):
    network, checkpoint = made(kind, tmp_path / "model")
    bundle = export_to_cache(checkpoint, quant="fp32")
    manifest = open_bundle(bundle).manifest
    assert len(manifest.notes) == 1
    assert manifest.notes[0].startswith(f"a {kind} checkpoint")
    assert f"({manifest.architecture})" in manifest.notes[0]
    tokens = np.random.default_rng(0).integers(3, 300, families.PROMPT).tolist()
    with edgelm.load(bundle, threads=1, max_batch=1) as model:
        found = families.logits_of(model, tokens)
    expected = logits(network, tokens)
    assert 0.02 < expected.std() < 20
    assert np.abs(found - expected).max() < families.TOLERANCE * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("layout", [newer, older])
@pytest.mark.parametrize("kind", ["gemma3", "mistral3", "llava"])
def test_both_layouts_of_tensors_are_read(kind, layout, tmp_path, export_to_cache):
    from safetensors.numpy import load_file, save_file

    _, checkpoint = made(kind, tmp_path / "model")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({layout(name): value for name, value in tensors.items()}, other / "model.safetensors")
    one, two = (open_bundle(export_to_cache(folder, quant="fp32")).manifest for folder in (checkpoint, other))
    assert one.weights_digest == two.weights_digest


def test_missing_options_of_the_text_model_are_the_class_defaults(tmp_path):
    from edgelm_export.architectures import find_architecture
    from edgelm_export.checkpoint.multimodal import extract_text_model

    class Named:
        names = ("language_model.model.embed_tokens.weight", "vision_tower.x")

    published = {  # gemma-3-4b-it
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    text = extract_text_model(Named(), published)
    decoder = find_architecture(text.config).read_config(text.config)
    assert (decoder.heads, decoder.kv_heads, decoder.head_size, decoder.vocab_size) == (8, 4, 256, 262_208)
    assert decoder.parameters == 4_300_079_472 - 416_866_032 - 2_950_272  # whole model, vision tower, projector
    assert text.config["eos_token_id"] == [1, 106]


def test_the_command_prints_the_note(tmp_path, run):
    _, checkpoint = made("llava", tmp_path / "model")
    code, out, err = run("export", checkpoint, tmp_path / "out", "--quant", "fp32")
    assert code == 0
    assert "note: a llava checkpoint" in err
    assert "(llama)" in err
    code, out, _ = run("export", checkpoint, tmp_path / "other", "--quant", "fp32", "--json")
    assert json.loads(out)["notes"][0].startswith("a llava checkpoint")
    code, out, _ = run("info", tmp_path / "out")
    assert "a llava checkpoint" in out
