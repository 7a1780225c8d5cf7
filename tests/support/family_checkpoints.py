"""Small random checkpoints of every family, written with numpy alone: what the exporter reads, in its own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from tiny import save_tensors, tokenizer_json, write_json

BASE: Final = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""What the checkpoints are where a test does not say otherwise."""


def write_checkpoint(path: Path, family: str, **options: Any) -> Path:
    """Write a checkpoint of a family into a new directory; `options` are entries of its config.json."""
    config = {**BASE, "model_type": family, **options}
    path.mkdir(parents=True)
    write_json(path / "config.json", config)
    (path / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    save_tensors(path, tensors_of(config))
    return path


def tensors_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return random weights float32 by the names that the family of a config.json gives them."""
    from edgelm_export.architectures import find_architecture

    architecture = find_architecture(config)
    d, names = architecture.read_config(config), architecture.tensor_names
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, bias: bool = False) -> None:
        found[name] = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        if bias:
            found[f"{name.removesuffix('weight')}bias"] = rng.normal(0, 0.3, rows).astype(np.float32)

    def norm(name: str, size: int = d.hidden_size) -> None:
        found[name] = (rng.uniform(0.5, 1.5, size) - d.norm_offset).astype(np.float32)

    q, kv = d.heads * d.head_size, d.kv_heads * d.head_size
    matrix(names.embedding, d.vocab_size, d.hidden_size)
    for i in range(len(d.layers)):
        layer = {field: getattr(names, field).format(i=i) for field in names.__dataclass_fields__}
        if d.pre_norm:
            norm(layer["attention_norm"])
            norm(layer["mlp_norm"])
        if d.post_norm:
            norm(layer["attention_post_norm"])
            norm(layer["mlp_post_norm"])
        if d.qk_norm:
            norm(layer["query_norm"], q if d.qk_norm == "projection" else d.head_size)
            norm(layer["key_norm"], kv if d.qk_norm == "projection" else d.head_size)
        parts = {"qkv": q + 2 * kv} if names.qkv else {"query": q, "key": kv, "value": kv}
        for part, rows in parts.items():
            matrix(layer[part], rows, d.hidden_size, d.qkv_bias)
        matrix(layer["output"], d.hidden_size, q, d.output_bias)
        parts = {"gate_up": 2 * d.mlp_size} if names.gate_up else {"gate": d.mlp_size, "up": d.mlp_size}
        for part, rows in parts.items():
            matrix(layer[part], rows, d.hidden_size, d.mlp_bias)
        matrix(layer["down"], d.hidden_size, d.mlp_size, d.mlp_bias)
    norm(names.final_norm)
    if not d.has_tied_head:
        matrix(names.head, d.vocab_size, d.hidden_size)
    return found
