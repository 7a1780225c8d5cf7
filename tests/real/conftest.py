"""A real model in every form that the tests look at, each made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

WINDOW = 512
WINDOWS = 3
"""Windows of text that perplexity is measured on, each `WINDOW` tokens."""


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in Hugging Face form, float32, as our own reader takes it from the GGUF file."""
    from edgelm_export.checkpoint import open_checkpoint
    from edgelm_export.source_model import open_source_model
    from safetensors.numpy import save_file

    opened, model = open_checkpoint(smollm2_gguf), open_source_model(smollm2_gguf)
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "config.json").write_text(json.dumps(dict(opened.config)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(opened.tokenizer_config)), encoding="utf-8")
    (folder / "tokenizer.json").write_text(opened.tokenizer_text, encoding="utf-8")
    d, names = model.decoder, model.weights.tensor_names
    heads = (d.heads * d.head_size, d.kv_heads * d.head_size)
    shapes = {names.embedding: (d.vocab_size, d.hidden_size), names.final_norm: (d.hidden_size,)}
    for i in range(len(d.layers)):
        shapes |= {
            name.format(i=i): shape
            for name, shape in {
                names.attention_norm: (d.hidden_size,),
                names.mlp_norm: (d.hidden_size,),
                names.query: (heads[0], d.hidden_size),
                names.key: (heads[1], d.hidden_size),
                names.value: (heads[1], d.hidden_size),
                names.output: (d.hidden_size, heads[0]),
                names.gate: (d.mlp_size, d.hidden_size),
                names.up: (d.mlp_size, d.hidden_size),
                names.down: (d.hidden_size, d.mlp_size),
            }.items()
        }
    save_file({name: opened.tensor(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def real_bundle(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Options of an export -> the bundle of the GGUF file. Treat it as read-only."""
    import edgelm_export

    made: dict[tuple[object, ...], Path] = {}

    def export(**options: object) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = edgelm_export.export(
                smollm2_gguf, tmp_path_factory.mktemp("real") / "bundle", context=1024, **options
            ).path
        return made[key]

    return export


@pytest.fixture(scope="session")
def windows(shared: Path, smollm2_gguf: Path) -> list[NDArray[np.int64]]:
    """A few windows of WikiText-2's validation text, from all over it."""
    from edgelm_export.source_model import open_source_model

    text = (shared / "data" / "wikitext2" / "valid.txt").read_text("utf-8")
    tokenizer = open_source_model(smollm2_gguf).tokenizer
    starts = [i * len(text) // WINDOWS for i in range(WINDOWS)]
    return [
        np.array(tokenizer.encode(text[start : start + 8 * WINDOW], add_special_tokens=False)[:WINDOW], np.int64)
        for start in starts
    ]
