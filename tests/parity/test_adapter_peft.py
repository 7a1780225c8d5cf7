"""LoRA adapters against peft itself, if peft is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TinyLlama

pytest.importorskip("safetensors", reason="needs pip install 'edgelm[export]'")
pytest.importorskip("peft", reason="needs pip install peft")
pytest.importorskip("torch", reason="needs pip install 'edgelm[distill]'")
pytest.importorskip("transformers", reason="needs pip install 'edgelm[distill]'")

import peft
import torch
import transformers
from edgelm_export.checkpoint import Checkpoint, open_checkpoint
from edgelm_export.checkpoint.lora import AdaptedWeights, Adapter, open_adapter


@pytest.fixture
def train(tmp_path: Path, one_torch_thread: None) -> Callable[..., tuple[Any, Checkpoint, Adapter]]:
    """Write a base and an adapter with peft; return peft's unmerged model, and both opened by us."""

    def make(shape: TinyLlama, **options: Any) -> tuple[Any, Checkpoint, Adapter]:
        base = open_checkpoint(shape.write(tmp_path / "base"))
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name:
                    parameter += torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        adapter = open_adapter(tmp_path / "adapter", base.config)
        adapter.check(base.names)
        return adapted, base, adapter

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8},
        {"target_modules": "all-linear", "r": 3, "lora_alpha": 5, "use_rslora": True},
        {
            "target_modules": ["q_proj", "k_proj", "gate_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7, "k_proj": 2},
            "alpha_pattern": {r"layers\.\d.mlp.gate_proj": 32, "proj": 9, "q_proj": 11},
        },
        {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "r": 4},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ],
    ids=["plain", "all-linear", "patterns", "embedding", "whole"],
)
def test_adapted_weights_equal_those_of_peft(train: Callable[..., Any], options: dict[str, Any]) -> None:
    shape = TinyLlama(layers=2, tied=False)
    model, base, adapter = train(shape, **options)
    expected = model.merge_and_unload().state_dict()
    changed = 0
    for name, weight in shape.tensors().items():
        found = AdaptedWeights(base, adapter).tensor(name, weight.shape)
        np.testing.assert_allclose(found, expected[name].numpy(), rtol=1e-6, atol=1e-6)
        changed += not np.array_equal(found, weight)
    assert changed == len(adapter.changed_tensors) > 0


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_a_tied_matrix_is_changed_once(train: Callable[..., Any], options: dict[str, Any]) -> None:
    """Compared with peft before merging; merged, peft would add the change twice."""
    shape = TinyLlama(layers=1)
    model, base, adapter = train(shape, **{"target_modules": ["q_proj"], "ensure_weight_tying": True, **options})
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        plain = type(model.get_base_model()).from_pretrained(base.path, dtype=torch.float32)
        for name, weight in shape.tensors().items():
            plain.get_parameter(name).copy_(torch.from_numpy(AdaptedWeights(base, adapter).tensor(name, weight.shape)))
        np.testing.assert_allclose(plain(tokens).logits, expected, rtol=1e-4, atol=1e-3)
