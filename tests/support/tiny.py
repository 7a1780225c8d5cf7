"""Small random Llama checkpoints in Hugging Face's format, written with numpy only; the tests export them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

TEXT = [
    "Once upon a time there was a little girl who liked to play in the park with her dog.",
    "Turn off the light in the kitchen, please, and play some jazz by Miles Davis.",
    'Größe, naïve, 東京, emoji 🙂 and numbers 0123456789: {} [] "quoted" <tag>.',
    "The cat sat on the mat. The dog ran to the cat. The end?",
]
"""Training texts of the tokenizer."""

BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class TinyLlama:
    """Shape of a checkpoint. With `head_size` None, config.json has no head_dim; `scaling` is its rope_scaling."""

    vocab: int = 331
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_size: int | None = None
    mlp: int = 96
    context: int = 512
    tied: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    theta: float = 10000.0
    scaling: tuple[tuple[str, Any], ...] | None = None
    dtype: str = "float32"
    shards: int = 1
    seed: int = 0
    bos: bool = True

    def config(self) -> dict[str, Any]:
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "rope_scaling": dict(self.scaling) if self.scaling else None,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied,
            "torch_dtype": self.dtype,
            "bos_token_id": 0 if self.bos else None,
            "eos_token_id": 1,
        }
        return config if self.head_size is None else {**config, "head_dim": self.head_size}

    def tensors(self) -> dict[str, np.ndarray]:
        """Random weights, float32, of a size that gives peaked but not degenerate logits."""
        generator = np.random.default_rng(self.seed)
        size = self.head_size or self.hidden // self.heads
        found: dict[str, np.ndarray] = {}

        def matrix(name: str, rows: int, columns: int, bias: bool = False, std: float | None = None) -> None:
            std = columns**-0.5 if std is None else std
            found[f"{name}.weight"] = generator.normal(0, std, (rows, columns)).astype(np.float32)
            if bias:
                found[f"{name}.bias"] = generator.normal(0, 0.3, rows).astype(np.float32)

        def norm(name: str) -> None:
            found[f"{name}.weight"] = generator.uniform(0.5, 1.5, self.hidden).astype(np.float32)

        matrix("model.embed_tokens", self.vocab, self.hidden, std=0.5)
        for i in range(self.layers):
            layer = f"model.layers.{i}"
            norm(f"{layer}.input_layernorm")
            matrix(f"{layer}.self_attn.q_proj", self.heads * size, self.hidden, self.attention_bias)
            matrix(f"{layer}.self_attn.k_proj", self.kv_heads * size, self.hidden, self.attention_bias)
            matrix(f"{layer}.self_attn.v_proj", self.kv_heads * size, self.hidden, self.attention_bias)
            matrix(f"{layer}.self_attn.o_proj", self.hidden, self.heads * size, self.attention_bias)
            norm(f"{layer}.post_attention_layernorm")
            matrix(f"{layer}.mlp.gate_proj", self.mlp, self.hidden, self.mlp_bias)
            matrix(f"{layer}.mlp.up_proj", self.mlp, self.hidden, self.mlp_bias)
            matrix(f"{layer}.mlp.down_proj", self.hidden, self.mlp, self.mlp_bias)
        norm("model.norm")
        if not self.tied:
            matrix("lm_head", self.vocab, self.hidden, std=0.5)
        return found

    def write(self, path: Path) -> Path:
        """Write the checkpoint into a new directory."""
        path.mkdir(parents=True)
        write_json(path / "config.json", self.config())
        special = {"bos_token": BOS, "eos_token": EOS} if self.bos else {"eos_token": EOS}
        write_json(path / "tokenizer_config.json", {**special, "chat_template": CHAT_TEMPLATE})
        (path / "tokenizer.json").write_text(tokenizer_json(self.bos), encoding="utf-8")
        save_tensors(path, self.tensors(), self.dtype, self.shards)
        return path


TURN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CHAT_TEMPLATE = TURN + "{% if add_generation_prompt %}[assistant]{% endif %}"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def save_tensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "float32", shards: int = 1) -> None:
    """Write model.safetensors, or several files with an index."""
    import ml_dtypes
    from safetensors.numpy import save_file

    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    stored = {name: value.astype(kind) for name, value in tensors.items()}
    if shards == 1:
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(stored)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[i::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


@cache
def tokenizer_json(bos: bool = True) -> str:
    """Return a byte-level BPE of about 300 tokens; with `bos`, it adds a start token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer.to_str()
