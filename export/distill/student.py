"""Students as transformers models: made from a shape, opened from a directory, written as a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from edgelm.errors import CheckpointError

from ..checkpoint.transformers_config import SAFE_LOAD_OPTIONS, read_safe_config
from .shape import StudentShape


def make_student(shape: StudentShape, vocab_size: int, context: int, bos: int, eos: int, seed: int) -> Any:
    """Return a Llama with random weights and a tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    depth = (
        2 * shape.layers
    ) ** -0.5  # as in GPT-2: the initial output of each layer shrinks with the number of layers
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.normal_(weight, std=config.initializer_range * depth)
    return model


def inherit_layers(student: Any, teacher: Any) -> bool:
    """Start from the teacher's weights if the student differs from it only in the number of layers.

    The student's layers get the teacher's at even distances, including the first and the last, as in DistilBERT (Sanh
    et al. 2019, arXiv:1910.01108, section 3, which takes one layer of two). Returns False if the shapes differ; the
    student is then unchanged.
    """
    teacher_layers, student_layers = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    if student_layers > teacher_layers:
        return False
    taken = [round(i * (teacher_layers - 1) / max(student_layers - 1, 1)) for i in range(student_layers)]
    theirs, inherited = teacher.state_dict(), {}
    for name, weight in student.state_dict().items():
        source = re.sub(r"(?<=\.layers\.)\d+", lambda found: str(taken[int(found[0])]), name)
        if source not in theirs or theirs[source].shape != weight.shape:
            return False
        inherited[name] = theirs[source].clone()
    student.load_state_dict(inherited)
    return True


def load_transformers_model(directory: Path, what: str) -> Any:
    """Open a Hugging Face causal language model in fp32; `what` ("teacher", "student") names it in errors.

    Raises
    ------
    CheckpointError
        transformers cannot read the directory, or its weights are not safetensors. Code in it is never run.
    """
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"{what} {directory} has no config.json; expected a Hugging Face directory")
    config = read_safe_config(transformers, directory)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=torch.float32, attn_implementation="eager", **SAFE_LOAD_OPTIONS
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{what} {directory} cannot be read: {error}") from error
    return model


def save_student(model: Any, directory: Path, eos: list[int]) -> None:
    """Write config.json, model.safetensors and generation_config.json."""
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=eos, pad_token_id=eos[0], do_sample=False
    )
    model.config.eos_token_id = eos[0]
    model.config.pad_token_id = eos[0]
    model.save_pretrained(directory, safe_serialization=True)
