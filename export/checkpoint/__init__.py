"""Where weights, configuration and tokenizer of a model come from: a Hugging Face directory or a hub id."""

from pathlib import Path

from .checkpoint import Checkpoint, Source, Tensors
from .huggingface import Safetensors, locate, open_huggingface
from .reading import read_json

__all__ = ["Checkpoint", "Safetensors", "Source", "Tensors", "locate", "open_checkpoint", "read_json"]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a directory, or download a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.

    Raises `CheckpointError` when there is no such directory or repository, a file is missing, or one is damaged.
    """
    return open_huggingface(source)
