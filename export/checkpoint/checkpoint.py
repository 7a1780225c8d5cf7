"""An opened checkpoint of any form: configuration and tokenizer in Hugging Face's terms, tensors by name.

Each form (a Hugging Face directory, a GGUF file) is a module that reads its files into a `Checkpoint`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class TensorSource(Protocol):
    """A source of a model's weights."""

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> NDArray[np.float32]:
        """See `CheckpointTensors.tensor`."""


class CheckpointTensors(TensorSource, Protocol):
    """The tensors of a checkpoint, by Hugging Face's names."""

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name."""

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> NDArray[np.float32]:
        """Return one tensor as float32 [*shape], or some of its rows (first dimension, step 1).

        Raises `CheckpointError` if it is missing, has another shape, is not floating point, or holds NaN or infinity.
        """


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint.

    path: what was opened, for messages. config, generation_config, tokenizer_config: the contents of config.json,
    generation_config.json and tokenizer_config.json. tokenizer_text: the text of tokenizer.json. notes: sentences for
    the user on parts that the export leaves out or reads differently. is_quantized: the tensors were published
    quantized. library_versions: versions of libraries that the weights depend on, for the manifest.
    """

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer_config: Mapping[str, Any]
    tokenizer_text: str
    tensors: CheckpointTensors
    notes: tuple[str, ...] = ()
    is_quantized: bool = False
    library_versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokenizer_path(self) -> Path:
        """The file with the tokenizer, for messages."""
        return self.path / "tokenizer.json" if self.path.is_dir() else self.path

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name."""
        return self.tensors.names

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> NDArray[np.float32]:
        """See `CheckpointTensors.tensor`."""
        return self.tensors.tensor(name, shape, rows)
