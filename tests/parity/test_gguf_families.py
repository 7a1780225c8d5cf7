"""GGUF files of every architecture, in the form of llama.cpp's converter, against transformers."""

from __future__ import annotations

import families
import numpy as np
import pytest
from edgelm_export.architectures import find_architecture
from edgelm_export.architectures.weights import DecoderWeights
from edgelm_export.checkpoint import open_checkpoint
from gguf_files import write_gguf
from tiny import tokenizer_json

torch = pytest.importorskip("torch", reason="needs pip install 'edgelm[distill]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'edgelm[distill]'")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1 + i / 8 for i in range(8)],
    "long_factor": [2 + 3.0 * i for i in range(8)],
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-24": ("llama", {"head_dim": 24}),
    "llama-one-key-head": ("llama", {"num_key_value_heads": 1}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.5}}),
    "llama-3": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-yarn-options": (
        "llama",
        {"rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 20.0, "beta_slow": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**GEMMA, "sliding_window": 30}),
    "gemma3": ("gemma3_text", {**GEMMA, "sliding_window": 30, "num_hidden_layers": 7}),
    "gemma3-linear": (
        "gemma3_text",
        {
            **GEMMA,
            "sliding_window": 30,
            "num_hidden_layers": 7,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3": ("phi3", {"sliding_window": 30}),
    "phi3-partial": ("phi3", {"hidden_size": 128, "num_attention_heads": 2, "partial_rotary_factor": 0.75}),
    "phi3-longrope": ("phi3", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
}


def both(family, options, folder):
    """Write a random model in both forms."""
    network = families.random_model(family, **options)
    checkpoint = families.write(network, folder / "model")
    tensors = {name: value.numpy() for name, value in network.state_dict().items()}
    config = {**network.config.to_dict(), "tie_word_embeddings": network.config.tie_word_embeddings}
    path = write_gguf(folder / "model.gguf", config, tensors, tokenizer=tokenizer_json())
    return network, checkpoint, path


@pytest.mark.parametrize(("family", "options"), CASES.values(), ids=CASES)
def test_logits_and_greedy_steps_match_transformers(family, options, tmp_path, export_to_cache):
    network, checkpoint, path = both(family, options, tmp_path)
    theirs, ours = open_checkpoint(checkpoint), open_checkpoint(path)
    expected = find_architecture(theirs.config)
    found = find_architecture(ours.config)
    first = DecoderWeights(theirs, expected.read_config(theirs.config), expected.tensor_names)
    second = DecoderWeights(ours, found.read_config(ours.config), found.tensor_names)
    for (name, rows), (_, other) in zip(first.matrices(), second.matrices(), strict=True):
        assert np.array_equal(rows.read_all(), other.read_all()), name
    assert first.decoder.parameters == second.decoder.parameters
    families.compare(network, export_to_cache(path, quant="fp32"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        CASES["llama"],
        CASES["qwen2"],
        ("qwen3", {"head_dim": 128}),
        CASES["gemma2"],
    ],  # it supports no other head size of Qwen 3
    ids=["llama", "qwen2", "qwen3", "gemma2"],
)
def test_weights_equal_those_of_transformers_own_loader(family, options, tmp_path):
    _, _, path = both(family, options, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours = open_checkpoint(path)
    named = dict(loaded.named_parameters())
    assert set(ours.names) - {"lm_head.weight"} == set(named) - {"lm_head.weight"}
    for name, parameter in named.items():
        if name in ours.names:
            assert np.allclose(ours.tensor(name, tuple(parameter.shape)), parameter.detach().numpy(), atol=1e-6), name
