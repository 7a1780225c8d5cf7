"""A Hugging Face checkpoint on disk or on the hub: configuration, tokenizer files, weights read lazily.

Knows the file formats, not architectures. Weights are memory-mapped; one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes  # noqa: F401 registers bfloat16 with numpy, for safetensors
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgelm.errors import CheckpointError

from .checkpoint import Checkpoint
from .hub import HUB_ID, download
from .multimodal import extract_text_model
from .published_quantization import dequantize_tensors
from .reading import check_file_content, read_json, read_text
from .tokenizer_files import apply_tokenizer_class, with_special_tokens

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
FLOATS: Final = {"F32", "F16", "BF16", "F64"}
FLOAT8_TYPES: Final = {"F8_E4M3"}
"""Types that numpy does not have; they are read as bytes."""


@dataclass(frozen=True, slots=True)
class Safetensors:
    """The tensors of a directory. `files`: the safetensors file of each tensor."""

    path: Path
    files: Mapping[str, Path]

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name."""
        return self.files.keys()

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> NDArray[np.float32]:
        """See `CheckpointTensors.tensor`."""
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no tensor {name}; is the checkpoint complete?")
        file = self.files[name]
        kind, found = self.layout(name)
        if found != shape:
            raise CheckpointError(f"{name} in {file} has shape {list(found)}, expected {list(shape)}")
        if kind not in FLOATS:
            raise CheckpointError(f"{name} in {file} is {kind}; expected one of {', '.join(sorted(FLOATS))}")
        values: NDArray[np.float32] = self.read(name, rows).astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} in {file} holds NaN or infinite values")
        return values

    def layout(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return a tensor's type in safetensors' spelling, and its shape. Raises `CheckpointError`."""
        if name not in self.files:
            raise CheckpointError(f"{self.path} has no tensor {name}; is the checkpoint complete?")
        try:
            with safe_open(self.files[name], "np") as stored:
                view = stored.get_slice(name)
                return view.get_dtype(), tuple(view.get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.files[name]} cannot be read: {error}") from error

    def read(self, name: str, rows: slice | None = None, columns: slice | None = None) -> NDArray[Any]:
        """Return a tensor with its stored dtype, or some of its rows and columns (step 1); 8-bit floats as uint8.

        Raises `CheckpointError`.
        """
        kind, shape = self.layout(name)
        file = self.files[name]
        try:
            if kind in FLOAT8_TYPES:
                whole: NDArray[Any] = np.memmap(file, np.uint8, "r", _offset(file, name), shape)
            elif rows is None and columns is None:
                with safe_open(file, "np") as stored:
                    return np.asarray(stored.get_tensor(name))
            else:
                with safe_open(file, "np") as stored:
                    view = stored.get_slice(name)
                    picked = rows or slice(0, shape[0])
                    return np.asarray(view[picked] if columns is None else view[picked, columns])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        picked = slice(None) if rows is None else rows
        return np.array(whole[picked] if columns is None else whole[picked, columns])


def open_huggingface(source: str | Path) -> Checkpoint:
    """Open a directory, or download a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`.

    Raises `CheckpointError` if the directory or repository does not exist, or a file is missing or damaged.
    """
    path = resolve_directory(source)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: it is not a Hugging Face checkpoint")
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path} has no tokenizer.json; `AutoTokenizer.from_pretrained(...).save_pretrained(...)` of transformers"
            " writes one"
        )
    config = read_json(path / "config.json")
    tokenizer_config = _tokenizer_config(path)
    stored = Safetensors(path, tensor_files(path))
    weights, how = dequantize_tensors(stored, config, path)
    text = extract_text_model(weights, config)
    return apply_tokenizer_class(
        Checkpoint(
            path=path,
            config=text.config,
            generation_config=read_json(path / "generation_config.json", optional=True),
            tokenizer_config=tokenizer_config,
            tokenizer_text=read_text(path / "tokenizer.json"),
            tensors=text.tensors,
            notes=tuple(note for note in (how, text.note) if note is not None),
            is_quantized=how is not None,
        )
    )


def _offset(file: Path, name: str) -> int:
    """Return the position of a tensor's bytes. The header is its length, uint64, and JSON; safetensors checked both."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return 8 + size + int(header[name]["data_offsets"][0])


def resolve_directory(source: str | Path) -> Path:
    """Return a directory; for a hub id, the directory of its download. Raises `CheckpointError`."""
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected a Hugging Face directory, a GGUF file or a hub id")
    if isinstance(source, Path) or not HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source} does not exist; expected a Hugging Face directory, a GGUF file,"
            " ollama:NAME or a hub id (owner/name)"
        )
    return download(source)


def _tokenizer_config(path: Path) -> dict[str, Any]:
    """Read tokenizer_config.json with the special tokens of special_tokens_map.json.

    A chat_template.jinja overrides its chat template, as in transformers; the chat_template.json of a multimodal
    checkpoint is used if there is no other.
    """
    config = read_json(path / "tokenizer_config.json", optional=True)
    config = with_special_tokens(config, read_json(path / "special_tokens_map.json", optional=True))
    older = read_json(path / "chat_template.json", optional=True).get("chat_template")
    if older is not None and config.get("chat_template") is None:
        config["chat_template"] = older
    template = path / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = read_text(template)
    return config


def tensor_files(path: Path) -> dict[str, Path]:
    """Return each tensor's file: model.safetensors, otherwise the shards that the index lists, as in transformers.

    Other *.safetensors files of the directory are not used; they may be earlier versions or training states. Raises
    `CheckpointError` if files are missing or not safetensors.
    """
    files: dict[str, Path] = {}
    for name in [SINGLE] if (path / SINGLE).is_file() else _shards(path):
        check_file_content(path / name)
        try:
            with safe_open(path / name, "np") as stored:
                files.update(dict.fromkeys(stored.keys(), path / name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path / name} cannot be read, it may be truncated: {error}") from error
    return files


def _shards(path: Path) -> list[str]:
    """Return the names of the files that the index lists. Raises `CheckpointError` if one is missing."""
    index = path / INDEX
    if not index.is_file():
        raise CheckpointError(_without_weights(path))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map")
    names = sorted(set(weight_map.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} names a file outside its directory")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} is incomplete: {INDEX} lists {missing[0]}, which is missing ({len(missing)} of {len(names)}"
            " shards are missing): download the checkpoint again"
        )
    return names


def _without_weights(path: Path) -> str:
    """Return the error for a directory without weights, with the files found instead."""
    expected = f"expected {SINGLE}, or {INDEX} and the shards it names"
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if "adapter_model.safetensors" in found:
        return f"{path} holds a LoRA adapter, not a model: export its base model with --adapter {path}"
    if any(re.fullmatch(r"model-\d+-of-\d+\.safetensors", name) for name in found):
        return f"{path} has shards such as {found[0]} but no {INDEX}, which lists the shards of the model; {expected}"
    if found:
        names = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        return f"{path} has no {SINGLE}, but {names}; {expected}: if it is the model's weights, rename it to {SINGLE}"
    pickled = "; pickled weights are not read, convert them with transformers" if any(path.glob("*.bin")) else ""
    return f"{path} has no *.safetensors file{pickled}; {expected}"
