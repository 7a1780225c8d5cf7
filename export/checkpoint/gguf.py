"""A GGUF file, whole or in parts, as a checkpoint. Weights are dequantized a few rows at a time when they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError

from .checkpoint import Checkpoint
from .gguf_config import StoredTensor, read_gguf_config, stored_tensors
from .gguf_file import GgufFile, GgufMetadata, import_gguf
from .gguf_tokenizer import read_gguf_tokenizer

DEQUANTIZE_CHUNK_BYTES: Final = 4 << 20
"""Bytes of float32 dequantized at a time; the library needs a few times as much in addition."""

PART: Final = re.compile(r"(?P<name>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")

SAMPLING: Final = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
"""Keys of the metadata, and the equivalent fields of generation_config.json."""

GGUF_BLOCK_SIZE: Final = 32
"""Weights that share a scale in Q4_0 and Q8_0."""

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """Rows as the file stores them: weight = (code - 2^(bits-1)) * scale.

    codes: uint8 [n, K], below 2^bits. scales: float16 [n, K / 32], of either sign, one for 32 weights of a row.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    bits: int


@dataclass(frozen=True, slots=True)
class GgufTensors:
    """The tensors of a model's files. `stored`: the location of each, by Hugging Face's name."""

    path: Path
    files: Sequence[GgufFile]
    stored: Mapping[str, StoredTensor]

    @property
    def names(self) -> Collection[str]:
        """Every tensor's name."""
        return self.stored.keys()

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> Array:
        """See `CheckpointTensors.tensor`."""
        stored, file = self._stored(name, shape), self._file(name)
        values = _in_order(stored, rows, lambda start, stop: dequantize_rows(file, stored.name, start, stop))
        if not np.isfinite(values).all():
            raise CheckpointError(f"{stored.name} in {self.path} holds NaN or infinite values")
        return values if stored.offset == 0 else values - np.float32(stored.offset)

    def kind(self, name: str) -> str:
        """Return the type of a stored tensor, such as "Q4_0"."""
        return self._file(name).tensors[self.stored[name].name].kind

    def blocks(self, name: str, shape: tuple[int, int], rows: slice | None = None) -> GgufBlocks | None:
        """Return a matrix, or some of its rows, in its stored blocks; None if it is neither Q4_0 nor Q8_0.

        Raises `CheckpointError` as `tensor` does.
        """
        stored = self._stored(name, shape)
        bits = {"Q4_0": 4, "Q8_0": 8}.get(self.kind(name))
        if bits is None or stored.offset:
            return None
        file, width = self._file(name), 2 + GGUF_BLOCK_SIZE * bits // 8
        raw = _in_order(stored, rows, lambda start, stop: file.rows(stored.name, start, stop))
        blocks = raw.reshape(len(raw), -1, width)
        scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2")[:, :, 0]
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{stored.name} in {self.path} holds NaN or infinite values")
        codes = blocks[:, :, 2:] ^ np.uint8(0x80)  # from signed to unsigned: 128 is zero
        if bits == 4:  # the low halves are the first 16 weights of a block
            codes = np.concatenate([blocks[:, :, 2:] & 0xF, blocks[:, :, 2:] >> 4], axis=2)
        return GgufBlocks(codes.reshape(len(raw), -1), scales.astype(np.float16), bits)

    def _stored(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        if name not in self.stored:
            raise CheckpointError(f"{self.path} has no tensor for {name}; is the file complete?")
        stored = self.stored[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.name} in {self.path} has shape {list(stored.shape)}, expected {list(shape)}"
            )
        return stored

    def _file(self, name: str) -> GgufFile:
        return next(file for file in self.files if self.stored[name].name in file.tensors)


def open_gguf(path: Path, defaults: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open a GGUF file; of a split one, the first part.

    `defaults` are fields of generation_config.json that override the file's own. Raises `CheckpointError` for a file
    that is damaged, incomplete, or not supported.
    """
    files = _parts(path)
    metadata = GgufMetadata(path, files[0].metadata)
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    config = read_gguf_config(metadata, tensors, lambda name: _read_whole(files, name))
    stored = stored_tensors(config, metadata, tensors)
    tokenizer = read_gguf_tokenizer(metadata)
    generation = {**_sampling(metadata), **(defaults or {})}
    stops = generation.get("stop_strings", [])
    ends = [*tokenizer.end_ids, *(tokenizer.control[text] for text in stops if text in tokenizer.control)]
    return Checkpoint(
        path=path,
        config={**config, "bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.pad},
        generation_config={
            **generation,
            "eos_token_id": list(dict.fromkeys(ends)),
            "stop_strings": [text for text in stops if text not in tokenizer.control],
        },
        tokenizer_config=tokenizer.config,
        tokenizer_text=tokenizer.tokenizer_text,
        tensors=GgufTensors(path, files, stored),
        library_versions={"gguf": version("gguf")},
    )


def dequantize_rows(file: GgufFile, name: str, start: int, stop: int) -> Array:
    """Dequantize rows [start, stop) of a tensor, float32 [rows, last dimension]; a vector is one row."""
    gguf, tensor = import_gguf(), file.tensors[name]
    kind = gguf.GGMLQuantizationType[tensor.kind]
    values = np.empty((stop - start, tensor.shape[-1]), np.float32)
    step = max(1, DEQUANTIZE_CHUNK_BYTES // (4 * tensor.shape[-1]))
    with np.errstate(all="ignore"):  # a damaged scale overflows; the result is checked
        for at in range(start, stop, step):
            end = min(at + step, stop)
            values[at - start : end - start] = gguf.dequantize(file.rows(name, at, end), kind)
    return values


def _in_order(stored: StoredTensor, rows: slice | None, read: Callable[[int, int], NDArray[Any]]) -> NDArray[Any]:
    """Return rows of a tensor in Hugging Face's order. `read` returns a range of rows in the file's order."""
    if len(stored.shape) == 2 and not stored.heads:
        start, stop, _ = (rows or slice(None)).indices(stored.shape[0])
        return read(start, stop)
    whole = read(0, stored.shape[0]) if len(stored.shape) == 2 else read(0, 1)[0]
    if stored.heads:  # [heads, head size / 2, 2, ...] -> [heads, 2, head size / 2, ...]
        paired = whole.reshape(stored.heads, -1, 2, *whole.shape[1:])
        whole = np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(whole.shape)
    return whole if rows is None else whole[rows]


def _read_whole(files: Sequence[GgufFile], name: str) -> Array:
    """Read a vector. Raises `CheckpointError` if it holds NaN or infinity."""
    file = next(file for file in files if name in file.tensors)
    values: Array = dequantize_rows(file, name, 0, 1)[0]
    if not np.isfinite(values).all():
        raise CheckpointError(f"{name} in {file.path} holds NaN or infinite values")
    return values


def _parts(path: Path) -> list[GgufFile]:
    """Open a file and, if it is the first part of several, the other parts beside it."""
    first = GgufFile(path)
    metadata = GgufMetadata(path, first.metadata)
    count = metadata.integer("split.count", 1)
    if count == 1:
        return [first]
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise CheckpointError(f"{path} is one of {count} parts; their names must be NAME-00001-of-{count:05}.gguf")

    def part(i: int) -> Path:
        return path.with_name(f"{named['name']}-{i + 1:05}-of-{count:05}.gguf")

    if metadata.integer("split.no", minimum=0) != 0:
        raise CheckpointError(f"{path} is not the first of its {count} parts: pass {part(0)}")
    files = [first]
    for i in range(1, count):
        if not part(i).is_file():
            raise CheckpointError(f"{part(i)} is missing: {path} is the first of {count} parts")
        file = GgufFile(part(i))
        if GgufMetadata(file.path, file.metadata).integer("split.no", minimum=0) != i:
            raise CheckpointError(f"{file.path} is not part {i + 1} of {count}, as its name says")
        files.append(file)
    names = [name for file in files for name in file.tensors]
    if len(set(names)) < len(names) or metadata.integer("split.tensors.count", len(names)) != len(names):
        raise CheckpointError(f"{path}: the {count} parts are not of one model")
    return files


def _sampling(metadata: GgufMetadata) -> dict[str, Any]:
    """Return the default sampling as fields of generation_config.json; empty if the file has none."""
    found = {ours: metadata.number(key) for key, ours in SAMPLING.items() if metadata.has_key(key)}
    if not found:
        return {}
    if "top_k" in found:
        found["top_k"] = max(int(found["top_k"]), 0)
    return {"do_sample": found.get("temperature", 1.0) > 0, **found}
