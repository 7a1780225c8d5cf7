"""Reads the GGUF container format, versions 2 and 3 (docs/gguf.md of ggml): metadata and tensors, lazily.

Knows the format, not models. The metadata is parsed here and not by `gguf.GGUFReader`, which creates several array
objects for every element of a list: 160 MB and seconds for a vocabulary of 49,152 tokens, and gigabytes for a hostile
count. Block layouts come from the package `gguf`. Every count, length and offset is checked against the file's size
before anything is read.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError
from edgelm.system.installation import missing_extra

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_DIMENSIONS: Final = 4
MAX_ELEMENTS: Final = 1 << 23
"""Maximum strings in a list; each becomes an object. The largest vocabularies have half a million merges."""

MAX_NAME: Final = 256
"""Maximum bytes of a key or a tensor's name. The format allows 65,535 for a key; none in use has a quarter of this."""

MAX_ALIGNMENT: Final = 1 << 20

TYPES: Final = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
"""Tensor types that can be read."""

SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Metadata type number -> format character of `struct`; 8 is a string, 9 a list."""

STRING, LIST = 8, 9
MIN_ENTRY_BYTES: Final = 13
"""Bytes of an entry with an empty key and a one-byte value."""

MIN_TENSOR_BYTES: Final = 32
"""Bytes of a tensor's entry with an empty name and one dimension."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Location of a tensor.

    shape: slowest dimension first, as in numpy. kind: name of its type, such as "Q4_0". block: elements stored
    together, in block_bytes bytes. offset: bytes from the start of the file.
    """

    shape: tuple[int, ...]
    kind: str
    block: int
    block_bytes: int
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, along the last dimension."""
        return self.shape[-1] // self.block * self.block_bytes

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return prod(self.shape[:-1]) * self.row_bytes


class GgufFile:
    """One GGUF file, mapped into memory.

    `metadata`: numbers, booleans, numpy arrays, and strings as bytes. `tensors`: by name. Raises `CheckpointError` if
    the file is not GGUF, has another version or byte order, is truncated, or is inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = _map(path)
        cursor = _Reader(path, self._data)
        entries, tensors = _read_header(cursor)
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.name("a key of the metadata")
            if key in self.metadata:
                raise CheckpointError(f"{path} is damaged: the key {key} occurs twice")
            self.metadata[key] = cursor.value(key)
        self.tensors = _read_tensors(cursor, tensors, _alignment(self))

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Return the stored bytes of rows [start, stop) of a tensor, uint8 [rows, row_bytes], mapped and read-only."""
        tensor = self.tensors[name]
        count = (stop - start) * tensor.row_bytes
        part = np.frombuffer(self._data, np.uint8, count, tensor.offset + start * tensor.row_bytes)
        return part.reshape(stop - start, tensor.row_bytes)


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """Typed access to a file's metadata. Methods raise `CheckpointError` with the key if a value is wrong."""

    path: Path
    values: Mapping[str, Any]

    def has_key(self, key: str) -> bool:
        """Return whether the key exists."""
        return key in self.values

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._value(key, default)
        if isinstance(value, bytes):
            return self._decoded(key, value)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return an integer in [minimum, 2^31); of a list with one entry per layer, the entry if all are equal."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.ndim and len(value) and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 1 << 31:
            raise self._wrong(key, f"a whole number of at least {minimum}, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; of a float32 the shortest decimal that rounds to it, as it was configured."""
        value = self._value(key, default)
        if isinstance(value, np.float32):
            value = float(str(value))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < float("inf"):
            raise self._wrong(key, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of strings."""
        value = self._value(key, None)
        if not isinstance(value, list):
            raise self._wrong(key, "a list of strings")
        return [self._decoded(key, each) for each in value]

    def numbers(self, key: str, count: int) -> NDArray[Any]:
        """Return a list with `count` finite numbers or booleans, one dimension."""
        value = self._value(key, None)
        if not isinstance(value, np.ndarray) or len(value) != count or not np.isfinite(value).all():
            raise self._wrong(key, f"a list of {count} finite numbers")
        return value

    def _value(self, key: str, default: Any) -> Any:
        if key not in self.values and default is None:
            raise CheckpointError(f"{self.path} has no {key} in its metadata: it is incomplete")
        return self.values.get(key, default)

    def _decoded(self, key: str, value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {key} is not valid UTF-8: {error.reason}") from error

    def _wrong(self, key: str, allowed: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} must be {allowed}, got {str(self.values.get(key))[:80]}")


def is_gguf(path: Path) -> bool:
    """Return whether a file starts as a GGUF file does."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def import_gguf() -> ModuleType:
    """Return the package `gguf`. Raises `MissingExtraError` if it is not installed."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise missing_extra("reading GGUF", "export", "gguf") from error
    module: ModuleType = gguf
    return module


class _Reader:
    """Reads values in sequence, and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.at = 0
        self._data = data

    @property
    def left(self) -> int:
        """Bytes after the position."""
        return len(self._data) - self.at

    def skip(self, count: int, what: str) -> int:
        """Skip bytes; return the position of the first."""
        if count > self.left:
            raise CheckpointError(
                f"{self.path} is damaged or truncated: {what} has {count} bytes, but the file ends after {self.left}"
            )
        self.at += count
        return self.at - count

    def take(self, count: int, what: str) -> bytes:
        start = self.skip(count, what)
        return self._data[start : self.at]

    def scalar(self, letter: str, what: str) -> Any:
        (value,) = struct.unpack("<" + letter, self.take(struct.calcsize("<" + letter), what))
        return np.float32(value) if letter == "f" else value

    def string(self, what: str) -> bytes:
        return self.take(self.scalar("Q", what), what)

    def name(self, what: str) -> str:
        """Read a key or a tensor's name."""
        length = self.scalar("Q", what)
        if length > MAX_NAME:
            raise CheckpointError(
                f"{self.path} is damaged: {what} has {length} bytes, at most {MAX_NAME} are supported"
            )
        name = self.take(length, what).decode(errors="replace")
        if not name.isprintable() or "\ufffd" in name:
            raise CheckpointError(f"{self.path} is damaged: {what} is not printable text")
        return name

    def value(self, key: str) -> Any:
        kind = self.scalar("I", key)
        if kind == STRING:
            return self.string(key)
        if kind == LIST:
            return self._list(key)
        return self.scalar(self._letter(kind, key), key)

    def _list(self, key: str) -> Any:
        kind, count = self.scalar("I", key), self.scalar("Q", key)
        if kind == STRING:
            if count > min(MAX_ELEMENTS, self.left // 8):
                raise CheckpointError(f"{self.path} is damaged or truncated: {key} cannot be a list of {count} strings")
            return [self.string(key) for _ in range(count)]
        dtype = np.dtype(self._letter(kind, key)).newbyteorder("<")
        start = self.skip(count * dtype.itemsize, key)
        return np.frombuffer(self._data, dtype, count, start) if count else np.empty(0, dtype)

    def _letter(self, kind: int, key: str) -> str:
        if kind not in SCALARS:
            raise CheckpointError(f"{self.path} is damaged: {key} has the unknown type {kind}")
        return SCALARS[kind]


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_header(cursor: _Reader) -> tuple[int, int]:
    """Return the number of metadata entries, and of tensors."""
    path = cursor.path
    magic = cursor.take(min(4, cursor.left), "the header")
    if magic != MAGIC:
        pointer = magic == b"vers" and cursor.take(min(40, cursor.left), "the header").startswith(
            b"ion https://git-lfs"
        )
        hint = ": it is a Git LFS pointer, run `git lfs pull` to download the file" if pointer else ""
        raise CheckpointError(f"{path} is not a GGUF file, which starts with the letters GGUF{hint}")
    version = cursor.scalar("I", "the header")
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{path} is a big-endian GGUF file; convert the model again for little-endian machines")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path} is GGUF version {version}; versions 2 and 3 can be read: convert the model again"
        )
    tensors, entries = cursor.scalar("Q", "the header"), cursor.scalar("Q", "the header")
    if entries * MIN_ENTRY_BYTES + tensors * MIN_TENSOR_BYTES > cursor.left:
        raise CheckpointError(
            f"{path} is damaged or truncated: {cursor.left} bytes cannot hold {entries} entries and {tensors} tensors"
        )
    return entries, tensors


def _alignment(file: GgufFile) -> int:
    found = GgufMetadata(file.path, file.metadata).integer("general.alignment", 32)
    if found & (found - 1) or found > MAX_ALIGNMENT:
        raise CheckpointError(
            f"{file.path}: general.alignment must be a power of two up to {MAX_ALIGNMENT}, got {found}"
        )
    return found


def _read_tensors(cursor: _Reader, count: int, alignment: int) -> dict[str, GgufTensor]:
    path, gguf = cursor.path, import_gguf()
    sizes = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGML_QUANT_SIZES}
    found: dict[str, GgufTensor] = {}
    for _ in range(count):
        name = cursor.name("a tensor's name")
        dimensions = cursor.scalar("I", name)
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"{path} is damaged: {name} has {dimensions} dimensions, GGUF allows 1 to 4")
        shape = tuple(reversed([cursor.scalar("Q", name) for _ in range(dimensions)]))
        kind, block, block_bytes = sizes.get(cursor.scalar("I", name), ("of an unknown type", 1, 1))
        if kind not in TYPES:
            raise CheckpointError(
                f"{path}: {name} is {kind}, which cannot be read (supported: {', '.join(TYPES)}): use another"
                " quantization of the model"
            )
        if name in found or 0 in shape or shape[-1] % block:
            raise CheckpointError(f"{path} is damaged: {name} of shape {list(shape)} and type {kind} is not possible")
        found[name] = GgufTensor(shape, kind, block, block_bytes, cursor.scalar("Q", name))
    start = -(-cursor.at // alignment) * alignment
    for name, tensor in found.items():
        end = start + tensor.offset + tensor.bytes
        if tensor.offset % alignment or end > cursor.at + cursor.left:
            raise CheckpointError(
                f"{path} is damaged or truncated: {name} ends at byte {end}, the file at {cursor.at + cursor.left}"
            )
        found[name] = GgufTensor(tensor.shape, tensor.kind, tensor.block, tensor.block_bytes, start + tensor.offset)
    return found
