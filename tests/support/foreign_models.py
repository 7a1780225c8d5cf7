"""Small random models of architectures without a module here, made and written by transformers.

A test module that imports this one is skipped where the extra `optimum` is not installed.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
from tiny import BOS, EOS, tokenizer_json, write_json

NEEDS = "needs pip install 'edgelm[export,optimum]'"
torch = pytest.importorskip("torch", reason=NEEDS)
transformers = pytest.importorskip("transformers", reason=NEEDS)
onnx = pytest.importorskip("onnx", reason=NEEDS)
pytest.importorskip("optimum.exporters", reason=NEEDS)
if importlib.util.find_spec("optimum.exporters.onnx") is None:
    pytest.skip(NEEDS, allow_module_level=True)

CONTEXT, VOCAB = 96, 331
SHAPES = {
    # GPT-2's head is tied to its table; its width is no multiple of the block of 32.
    "gpt2": {"n_embd": 72, "n_layer": 2, "n_head": 3, "n_positions": CONTEXT},
    "gpt_neox": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": CONTEXT,
    },
    "opt": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 96,
        "max_position_embeddings": CONTEXT,
        "word_embed_proj_dim": 64,
        "pad_token_id": 1,
    },
    "mistral": {  # untied, grouped queries, and a window that the context must stay within
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": CONTEXT,
        "sliding_window": 64,
    },
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "seq_length": CONTEXT},  # places by attention mask alone
}


@cache
def model_of(kind: str):
    """A transformers model with random weights, biases and norms. Treat it as read-only."""
    torch.manual_seed(len(kind))
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, **SHAPES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.6 if "wpe" in name or "positions" in name else 1.2 * weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def write(model, path: Path) -> Path:
    """Write a model as a checkpoint with a tokenizer."""
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text(tokenizer_json(False), encoding="utf-8")
    write_json(path / "tokenizer_config.json", {"bos_token": BOS, "eos_token": EOS})
    return path
