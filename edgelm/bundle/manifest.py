"""The on-disk bundle: its manifest's schema, reading, writing, hashes. Sole owner of the format.

A bundle is a directory with `manifest.json`, an ONNX graph with its weights, and `tokenizer.json`. The manifest
lists every other file with its size and SHA-256; opening a bundle checks them all. Knows nothing of ONNX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from edgelm.bundle.field_types import check_type
from edgelm.bundle.store import missing_bundle_error, resolve_bundle_path
from edgelm.errors import BundleError, RequestError
from edgelm.system.digest import file_sha256
from edgelm.types import SamplingParams

SCHEMA: Final = 1
"""Version of the manifest's schema that this program writes; it reads this one and older ones."""

MANIFEST: Final = "manifest.json"

MAX_MANIFEST_BYTES: Final = 16_000_000
MAX_CONTEXT: Final = 1 << 24
"""Positions: sixteen times the longest context that a published model has."""
MAX_VOCAB_SIZE: Final = 1 << 22
MAX_LAYERS: Final = 1024
MAX_HEADS: Final = 1024
MAX_HEAD_SIZE: Final = 1024
MAX_ENTRIES: Final = 100_000
"""Matrices, and entries of every other list."""
MAX_FILES: Final = 1000
MAX_TEMPLATE_LENGTH: Final = 1_000_000
"""Characters of the chat template; of a name or note a hundredth."""
MAX_SIZE: Final = 1 << 40
"""Parameters, bytes of a file, rows or columns of a matrix."""


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """Shape of the key/value cache that the graph reads and writes, one pair a layer."""

    kind: Literal["shared", "growing"]
    """`shared`: one preallocated buffer is past and present; `growing`: the graph returns a longer copy."""
    layers: int
    kv_heads: int
    head_size: int
    bits: Literal[32, 8] = 32
    """Of each number: 32 is float32; 8 is int8, with a scale for each channel in the graph (`shared` only)."""

    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token occupies."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.bits // 8


@dataclass(frozen=True, slots=True)
class Matrix:
    """How one weight matrix is stored: `bits` 32 is float32; `columns` is the input width."""

    name: str
    rows: int
    columns: int
    bits: int
    block_size: int | None = None
    symmetric: bool = True
    accuracy_level: int | None = None
    method: str | None = None
    scale_bits: int = 32

    def bytes(self) -> int:
        """Bytes of weights, scales (one a block) and zero points, as they lie on disk."""
        if self.block_size is None:
            return self.rows * self.columns * self.bits // 8
        blocks = -(-self.columns // self.block_size)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return self.rows * (blocks * self.block_size * self.bits // 8 + blocks * self.scale_bits // 8 + zero_points)


@dataclass(frozen=True, slots=True)
class File:
    """Size and SHA-256 (hex) of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StaticPrefix:
    """Tokens that prompts are expected to begin with; `file` holds their keys and values (`runtime.prefix_file`)."""

    tokens: tuple[int, ...]
    file: str
    dtype: Literal["float32", "float16", "int8", "uint8"]
    """Of the numbers in the file: the cache's."""
    weights: str
    """`Manifest.weights_digest` of the graph that computed them."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a runtime needs to know about a bundle before it opens the graph."""

    architecture: str
    context: int
    vocab_size: int
    cache: KVCacheShape
    quant: str
    matrices: tuple[Matrix, ...]
    bos_token: int | None
    eos_tokens: tuple[int, ...]
    parameters: int
    shapes: Mapping[str, int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    chat_template: str | None = None
    bare_prompt: Literal["message", "text"] | None = None
    """What a prompt is that comes alone: a user's message for the chat template, or text to complete as it stands.
    None, in bundles of edgelm 0.1, is a message where there is a chat template."""
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)
    quality: Mapping[str, Any] | None = None
    """What the export measured beside the unquantized checkpoint; see `edgelm.runtime.divergence.Agreement`."""
    self_check: Mapping[str, Any] | None = None
    """The same on some hundred tokens of sample text, which every quantized export measures."""
    vocabulary: Mapping[str, Any] | None = None
    """What pruning the vocabulary did; the file `vocabulary.json` lists the kept tokens' old ids."""
    adapter: str | None = None
    """Name of the LoRA adapter that was merged."""
    via: Literal["native", "optimum"] = "native"
    long_from: int | None = None
    """A sequence longer than this looks up the second half of the rotary tables (LongRoPE)."""
    prefix: StaticPrefix | None = None
    notes: tuple[str, ...] = ()
    """What a person should know of the export, a sentence each: a part left out, weights read from a quantized form."""
    needs_onnxruntime: str | None = None
    """Oldest onnxruntime that runs the graph rightly, such as "1.28"; None is any that edgelm runs on."""
    graph: str = "model.onnx"
    files: Mapping[str, File] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def prompts_are_messages(self) -> bool:
        """Whether a prompt that comes alone is a user's message for the chat template."""
        return self.chat_template is not None and self.bare_prompt != "text"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight over all matrices, scales and zero points included."""
        weights = sum(matrix.rows * matrix.columns for matrix in self.matrices)
        return 8 * sum(matrix.bytes() for matrix in self.matrices) / max(weights, 1)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the manifest itself, which fixes every other file."""
        return hashlib.sha256(dump_manifest(self).encode()).hexdigest()

    @property
    def weights_digest(self) -> str:
        """SHA-256 (hex) over those of the graph and its data, the files whose names begin with the graph's."""
        names = sorted(name for name in self.files if name.startswith(self.graph))
        return hashlib.sha256("\n".join(self.files[name].sha256 for name in names).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened, verified bundle."""

    path: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        """The ONNX file."""
        return self.path / self.manifest.graph

    @property
    def tokenizer(self) -> Path:
        """The tokenizer.json of the Hugging Face tokenizers library."""
        return self.path / "tokenizer.json"

    @property
    def bytes(self) -> int:
        """Size of all files on disk, the manifest not counted."""
        return sum(file.bytes for file in self.manifest.files.values())

    def verify(self, known: Iterable[str] = ()) -> None:
        """Raise `BundleError` unless every file is what the manifest says; those in `known` are not hashed."""
        _verify(self.path, self.manifest, frozenset(known))


def open_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Open the bundle at `path`, or one by its name (`edgelm list`); `"builtin"` is the one inside the package.

    With `verify` every file's size and SHA-256 is checked. Raises `BundleError` for a missing or foreign directory,
    a newer schema, a missing file or a wrong hash.
    """
    root = resolve_bundle_path(path)
    if not root.is_dir():
        raise missing_bundle_error(str(path))
    try:
        text = _read_bounded(root / MANIFEST)
    except FileNotFoundError:
        raise BundleError(f"{root} has no {MANIFEST}: it is not a bundle; `edgelm export` makes one") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{root / MANIFEST} cannot be read: {error}") from error
    manifest = parse_manifest(text, str(root / MANIFEST))
    bundle = Bundle(root, manifest)
    if verify:
        bundle.verify()
    return bundle


def write_manifest(root: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `root`, write the manifest there, and return it with the hashes."""
    names = sorted(file.name for file in root.iterdir() if file.name != MANIFEST)
    files = {name: File((root / name).stat().st_size, file_sha256(root / name)) for name in names}
    sealed = dataclasses.replace(manifest, files=files)
    (root / MANIFEST).write_text(dump_manifest(sealed), encoding="utf-8")
    return sealed


def dump_manifest(manifest: Manifest) -> str:
    """Write the manifest as JSON text; the same manifest gives the same bytes."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def parse_manifest(text: str, where: str) -> Manifest:
    """Read a manifest; `where` names it in errors. Raises `BundleError`."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where} is not JSON: {error}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{where} is not a manifest of edgelm: it has no schema number")
    if schema > SCHEMA:
        raise BundleError(f"{where} has schema {schema}, this edgelm reads up to {SCHEMA}: upgrade edgelm")
    try:
        sampling = dict(raw["sampling"])
        manifest = Manifest(
            **{
                **raw,
                "cache": KVCacheShape(**raw["cache"]),
                "matrices": tuple(Matrix(**matrix) for matrix in _entries(raw["matrices"])),
                "eos_tokens": tuple(_entries(raw["eos_tokens"])),
                "sampling": SamplingParams(**{**sampling, "stop": tuple(_entries(sampling["stop"]))}),
                "prefix": _prefix(raw.get("prefix")),
                "notes": tuple(_entries(raw.get("notes", []))),
                "files": {_plain_name(name): File(**file) for name, file in raw["files"].items()},
                "graph": _plain_name(raw["graph"]),
            }
        )
        check_type(manifest, Manifest, "the manifest")
    except (KeyError, TypeError, ValueError, AttributeError, RequestError) as error:
        raise BundleError(f"{where} is damaged: {type(error).__name__}: {error}") from error
    cache = manifest.cache
    for name, value, low, high in _sizes(manifest):
        if not low <= value <= high:
            raise BundleError(f"{where} is damaged: {name} must lie in [{low}, {high}], it is {value!r:.40}")
    if cache.kind == "growing" and cache.bits != 32:
        raise BundleError(f"{where} is damaged: a growing cache has 32 bits, not {cache.bits}")
    if manifest.needs_onnxruntime is not None and not re.fullmatch(r"[0-9]+\.[0-9]+", manifest.needs_onnxruntime):
        raise BundleError(f"{where} is damaged: needs_onnxruntime cannot be {manifest.needs_onnxruntime!r:.80}")
    if manifest.prefix is not None and not _fits(manifest.prefix, manifest):
        raise BundleError(f"{where} is damaged: its static prefix is not one that this model can have")
    return manifest


def _read_bounded(file: Path) -> str:
    """Return a text file's content. Raises `ValueError` for one that is too large or no text, and `OSError`."""
    if not stat.S_ISREG(file.stat().st_mode):  # a named pipe from an archive would keep the reader waiting for ever
        raise ValueError("it is not a regular file")
    with file.open("rb") as stream:
        content = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
    return content.decode("utf-8")


def _sizes(manifest: Manifest) -> Iterator[tuple[str, int, int, int]]:
    """Yield every number that a manifest may set: its name, the number, the least and the most that it may be."""
    cache, vocabulary = manifest.cache, manifest.vocab_size
    yield "context", manifest.context, 1, MAX_CONTEXT
    yield "vocab_size", vocabulary, 1, MAX_VOCAB_SIZE
    yield "cache.layers", cache.layers, 1, MAX_LAYERS
    yield "cache.kv_heads", cache.kv_heads, 1, MAX_HEADS
    yield "cache.head_size", cache.head_size, 1, MAX_HEAD_SIZE
    yield "parameters", manifest.parameters, 0, MAX_SIZE
    tokens = [manifest.bos_token] if manifest.bos_token is not None else []
    yield "eos_tokens' number", len(manifest.eos_tokens), 0, MAX_ENTRIES
    for token in (*tokens, *manifest.eos_tokens):
        yield "a token", token, 0, vocabulary - 1
    if manifest.long_from is not None:
        yield "long_from", manifest.long_from, 1, MAX_CONTEXT
    for name, entries in (("matrices", manifest.matrices), ("special_tokens", manifest.special_tokens)):
        yield f"the number of {name}", len(entries), 0, MAX_ENTRIES
    for matrix in manifest.matrices:
        yield "rows", matrix.rows, 1, MAX_SIZE
        yield "columns", matrix.columns, 1, MAX_SIZE
        yield "bits", matrix.bits, 1, 64
        yield "scale_bits", matrix.scale_bits, 0, 64
        if matrix.block_size is not None:
            yield "block_size", matrix.block_size, 1, MAX_CONTEXT
    for number in manifest.shapes.values():
        yield "shapes", number, 0, MAX_SIZE
    yield "the number of files", len(manifest.files), 0, MAX_FILES
    for file in manifest.files.values():
        yield "bytes of a file", file.bytes, 0, MAX_SIZE
    yield "the length of chat_template", len(manifest.chat_template or ""), 0, MAX_TEMPLATE_LENGTH
    yield "the number of notes", len(manifest.notes), 0, MAX_FILES
    texts = (manifest.architecture, manifest.quant, manifest.graph, *manifest.notes, *manifest.files, *manifest.shapes)
    for text in (*texts, *(value for pair in manifest.special_tokens.items() for value in pair)):
        yield "the length of a text", len(text), 0, MAX_TEMPLATE_LENGTH // 100


def _prefix(raw: Any) -> StaticPrefix | None:
    if raw is None:
        return None
    return StaticPrefix(**{**raw, "tokens": tuple(_entries(raw["tokens"]))})


def _fits(prefix: StaticPrefix, manifest: Manifest) -> bool:
    return (
        prefix.file in manifest.files
        and 1 <= len(prefix.tokens) < manifest.context
        and all(0 <= token < manifest.vocab_size for token in prefix.tokens)
    )


def _entries(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.80} is not a list")
    return value


def _plain_name(name: str) -> str:
    """Refuse a name that would lead out of the bundle."""
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _verify(root: Path, manifest: Manifest, known: frozenset[str]) -> None:
    if manifest.prefix is not None and manifest.prefix.weights != manifest.weights_digest:
        raise BundleError(
            f"{root / manifest.prefix.file}: the static prefix was computed with other weights than {manifest.graph};"
            f" make it again with `edgelm prefix {root} FILE`, or go without: `edgelm prefix {root} --remove`"
        )
    for required in (manifest.graph, "tokenizer.json"):
        if required not in manifest.files:
            raise BundleError(f"{root / MANIFEST} is damaged: it does not list {required}")
    for name, expected in manifest.files.items():
        file = root / name
        if file.is_symlink() and not _stays_within(root, file):
            raise BundleError(f"{file} is a link that leads out of the bundle: put a copy of the file in its place")
        if not file.is_file():
            raise BundleError(f"{root} is incomplete: {name} is missing; export or copy the bundle again")
        size = file.stat().st_size
        if size != expected.bytes:
            raise BundleError(f"{file} is damaged: it has {size} bytes, the manifest says {expected.bytes}")
        if name not in known and file_sha256(file) != expected.sha256:
            raise BundleError(f"{file} is damaged: its SHA-256 is not the manifest's; export or copy it again")


def _stays_within(root: Path, link: Path) -> bool:
    try:
        return root.resolve() in link.resolve(strict=True).parents
    except (OSError, RuntimeError):  # it leads nowhere, or round in a circle
        return False
