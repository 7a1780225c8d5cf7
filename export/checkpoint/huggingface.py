"""A Hugging Face checkpoint on disk or on the hub: configuration, tokenizer files, weights read lazily.

Knows the file formats and nothing of architectures. Weights are memory-mapped; one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors then returns
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgelm.errors import CheckpointError

from .checkpoint import Checkpoint

HUB_FILES: Final = ["*.json", "*.safetensors", "*.jinja"]
FLOATS: Final = {"F32", "F16", "BF16", "F64"}


@dataclass(frozen=True, slots=True)
class Safetensors:
    """The tensors of a directory. `files` names the safetensors file that holds each one."""

    path: Path
    files: Mapping[str, Path]

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name."""
        return self.files.keys()

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> NDArray[np.float32]:
        """See `Tensors.tensor`."""
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no tensor {name}; is the checkpoint complete?")
        file = self.files[name]
        try:
            with safe_open(file, "np") as stored:
                view = stored.get_slice(name)
                found, kind = tuple(view.get_shape()), view.get_dtype()
                if found != shape:
                    raise CheckpointError(f"{name} in {file} has shape {list(found)}, expected {list(shape)}")
                if kind not in FLOATS:
                    raise CheckpointError(f"{name} in {file} is {kind}; expected one of {', '.join(sorted(FLOATS))}")
                part = stored.get_tensor(name) if rows is None else view[rows.start : rows.stop]
                values: NDArray[np.float32] = np.asarray(part).astype(np.float32)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} in {file} holds NaN or infinite values")
        return values


def open_huggingface(source: str | Path) -> Checkpoint:
    """Open a directory, or download a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.

    Raises `CheckpointError` when there is no such directory or repository, a file is missing, or one is damaged.
    """
    path = locate(source)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: it is not a Hugging Face checkpoint")
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json; `AutoTokenizer.from_pretrained(...).save_pretrained(...)` of transformers"
            " writes one"
        )
    return Checkpoint(
        path=path,
        config=read_json(path / "config.json"),
        generation=read_json(path / "generation_config.json", optional=True),
        tokenizer_config=_tokenizer_config(path),
        tokenizer_text=_read_text(path / "tokenizer.json"),
        tensors=Safetensors(path, _tensor_files(path)),
    )


def locate(source: str | Path) -> Path:
    """Return a directory, or where a hub id was downloaded to. Raises `CheckpointError`."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected a Hugging Face directory or hub id")
    if isinstance(source, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise CheckpointError(f"{source} does not exist; expected a Hugging Face directory or a hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # the library raises many unrelated types
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"{source} is no directory here and cannot be fetched from the hub: {type(error).__name__}: {reason}"
        ) from error


def read_json(file: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the object in a file; an empty one where `optional` and missing. Raises `CheckpointError`."""
    if optional and not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _tokenizer_config(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json; a chat_template.jinja beside it takes precedence, as in transformers."""
    config = read_json(path / "tokenizer_config.json", optional=True)
    template = path / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return config


def _tensor_files(path: Path) -> dict[str, Path]:
    """Map each tensor to its file, from the index where there is one."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names a file outside its directory")
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
        if not names:
            hint = "; pickled weights are not read, convert them with transformers" if any(path.glob("*.bin")) else ""
            raise CheckpointError(f"{path} has no *.safetensors file{hint}")
    files: dict[str, Path] = {}
    for name in names:
        try:
            with safe_open(path / name, "np") as stored:
                files.update(dict.fromkeys(stored.keys(), path / name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path / name} cannot be read, it may be truncated: {error}") from error
    return files
