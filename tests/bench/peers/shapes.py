"""Checkpoints of the shapes that are measured: published sizes with random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_COMMON: Final = {
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}

CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
    },
    "0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
}
"""config.json of SmolLM2-135M's, Qwen2.5-0.5B's and Llama-3.2-1B's shapes; the last without its scaled rotation, which
costs nothing at run time."""

STORIES: Final = "stories"
"""stories260K, the one with real weights: looked for among the shared models."""

NAMES: Final = {
    "135m": "SmolLM2-135M's shape",
    "0.5b": "Qwen2.5-0.5B's shape",
    "1b": "Llama-3.2-1B's shape",
    STORIES: "stories260K",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint's figures need."""

    context: int
    parameters: int
    vocab_size: int
    tied: bool
    cache_values: int
    """Keys and values that a token adds."""
    first_token: int

    @classmethod
    def of(cls, checkpoint: Path) -> Facts:
        """Read them from config.json and the files' headers."""
        from safetensors import safe_open

        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        parameters = 0
        for path in checkpoint.glob("*.safetensors"):
            with safe_open(path, "np") as file:
                parameters += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            context=config["max_position_embeddings"],
            parameters=parameters,
            vocab_size=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            cache_values=2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * size,
            first_token=config["bos_token_id"],
        )


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write normal weights of standard deviation 0.02 in bfloat16, norms of 1, and a tokenizer of bytes."""
    import ml_dtypes
    from safetensors.numpy import save_file

    config = _COMMON | config
    generator = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    width, mlp = config["hidden_size"], config["intermediate_size"]
    keys = config["num_key_value_heads"] * (width // config["num_attention_heads"])

    def matrix(name: str, rows: int, columns: int) -> None:
        drawn = generator.standard_normal((rows, columns), np.float32) * config["initializer_range"]
        tensors[f"{name}.weight"] = drawn.astype(ml_dtypes.bfloat16)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = np.ones(width, ml_dtypes.bfloat16)

    matrix("model.embed_tokens", config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm")
        norm(f"{layer}.post_attention_layernorm")
        for name, rows in (("q", width), ("k", keys), ("v", keys)):
            matrix(f"{layer}.self_attn.{name}_proj", rows, width)
            if config["model_type"] == "qwen2":
                tensors[f"{layer}.self_attn.{name}_proj.bias"] = np.zeros(rows, ml_dtypes.bfloat16)
        matrix(f"{layer}.self_attn.o_proj", width, width)
        matrix(f"{layer}.mlp.gate_proj", mlp, width)
        matrix(f"{layer}.mlp.up_proj", mlp, width)
        matrix(f"{layer}.mlp.down_proj", width, mlp)
    norm("model.norm")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """Bytes and three specials: token ids are what is measured, but some exporters want a tokenizer."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*specials, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": specials[0]}
    said |= {"bos_token": specials[1], "eos_token": specials[2], "pad_token": specials[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(said), encoding="utf-8")
