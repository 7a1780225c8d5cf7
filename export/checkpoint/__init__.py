"""Opens checkpoints: weights, configuration and tokenizer. One module for each form of checkpoint."""

from __future__ import annotations

from pathlib import Path

from edgelm.errors import CheckpointError

from .checkpoint import Checkpoint, CheckpointTensors, TensorSource
from .gguf import GgufBlocks, GgufTensors, open_gguf
from .gguf_file import is_gguf
from .huggingface import Safetensors, open_huggingface, resolve_directory
from .ollama import OLLAMA_SCHEME, open_ollama
from .reading import read_json

__all__ = [
    "Checkpoint",
    "CheckpointTensors",
    "GgufBlocks",
    "GgufTensors",
    "Safetensors",
    "TensorSource",
    "open_checkpoint",
    "read_json",
    "resolve_directory",
]


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a Hugging Face directory, a GGUF file or `ollama:NAME[:TAG]` of a local store, or download a hub id.

    A hub id is for example `HuggingFaceTB/SmolLM2-135M-Instruct`. Of a split GGUF file, pass the first part. Raises
    `CheckpointError` if the file, directory, model or repository does not exist, or a file is missing or damaged.
    """
    path = Path(source)
    if isinstance(source, str) and source.startswith(OLLAMA_SCHEME):
        return open_ollama(source)
    if path.is_file() and (path.suffix == ".gguf" or is_gguf(path)):
        return open_gguf(path)
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if files:
            raise CheckpointError(f"{path} is a directory with a GGUF file: export the file {files[0]}")
    return open_huggingface(source)
