"""The schema of a bundle's manifest: every key with type, range, default and meaning; README.md is the specification.

Owns the dataclasses and their JSON form. `manifest_parser` reads and checks a manifest, `bundle_folder` opens bundles.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from edgelm.types import SamplingParams
from edgelm.validation import Length, Pattern, Range

SCHEMA: Final = 1
"""Schema version that this program writes. It reads this version and older ones."""

MANIFEST: Final = "manifest.json"
TOKENIZER: Final = "tokenizer.json"

MAX_CONTEXT: Final = 1 << 24
"""Positions: sixteen times the longest context of a published model."""
MAX_VOCAB_SIZE: Final = 1 << 22
MAX_LAYERS: Final = 1024
MAX_HEADS: Final = 1024
MAX_HEAD_SIZE: Final = 1024
MAX_ENTRIES: Final = 100_000
"""Number of matrices, end tokens and special tokens, each."""
MAX_FILES: Final = 1000
"""Number of files and of notes, each."""
MAX_TEMPLATE_LENGTH: Final = 1_000_000
"""Characters of the chat template."""
MAX_TEXT_LENGTH: Final = 10_000
"""Characters of a name or note."""
MAX_SIZE: Final = 1 << 40
"""Parameters, bytes of a file, rows or columns of a matrix."""

_Text = Annotated[str, Length(0, MAX_TEXT_LENGTH)]
_Count = Annotated[int, Range(0, MAX_SIZE)]
_Dim = Annotated[int, Range(1, MAX_SIZE)]
_Context = Annotated[int, Range(1, MAX_CONTEXT)]
_FileName = Annotated[_Text, Pattern(r"^(?!\.{1,2}\Z)[^/\\\0]+\Z", "a plain file name")]
_Version = Annotated[str, Pattern(r"^[0-9]+\.[0-9]+\Z", "such as 1.28")]


@dataclass(frozen=True, slots=True)
class KVCacheShape:
    """Shape of the key/value cache that the graph reads and writes: one pair of tensors per layer."""

    kind: Literal["shared", "growing"]
    """`shared`: past and present are one preallocated buffer; `growing`: the graph returns a longer copy."""
    layers: Annotated[int, Range(1, MAX_LAYERS)]
    kv_heads: Annotated[int, Range(1, MAX_HEADS)]
    head_size: Annotated[int, Range(1, MAX_HEAD_SIZE)]
    bits: Literal[32, 8] = 32
    """Bits per number: 32 is float32; 8 is int8 with one scale per channel in the graph (`shared` only)."""

    def bytes_per_token(self) -> int:
        """Return the bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.bits // 8


@dataclass(frozen=True, slots=True)
class Matrix:
    """How one weight matrix is stored: `bits` 32 is float32; `columns` is the input width."""

    name: str
    rows: _Dim
    columns: _Dim
    bits: Annotated[int, Range(1, 64)]
    block_size: _Context | None = None
    symmetric: bool = True
    accuracy_level: int | None = None
    method: str | None = None
    scale_bits: Annotated[int, Range(0, 64)] = 32

    def bytes(self) -> int:
        """Return the bytes on disk of weights, scales (one per block) and zero points."""
        if self.block_size is None:
            return self.rows * self.columns * self.bits // 8
        blocks = -(-self.columns // self.block_size)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return self.rows * (blocks * self.block_size * self.bits // 8 + blocks * self.scale_bits // 8 + zero_points)


@dataclass(frozen=True, slots=True)
class BundleFile:
    """Size and SHA-256 (hex) of one file of the bundle."""

    bytes: _Count
    sha256: str


@dataclass(frozen=True, slots=True)
class StaticPrefix:
    """Tokens that prompts usually begin with; `file` holds their keys and values (`runtime.prefix_file`)."""

    tokens: tuple[int, ...]
    file: str
    dtype: Literal["float32", "float16", "int8", "uint8"]
    """Type of the numbers in the file, which is the KV cache's type."""
    weights: str
    """`Manifest.weights_digest` of the graph that computed the file."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a runtime needs to know about a bundle before it opens the graph."""

    architecture: _Text
    context: _Context
    vocab_size: Annotated[int, Range(1, MAX_VOCAB_SIZE)]
    cache: KVCacheShape
    quant: _Text
    matrices: Annotated[tuple[Matrix, ...], Length(0, MAX_ENTRIES)]
    bos_token: int | None
    eos_tokens: Annotated[tuple[int, ...], Length(0, MAX_ENTRIES)]
    parameters: _Count
    shapes: Mapping[_Text, _Count]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    chat_template: Annotated[str, Length(0, MAX_TEMPLATE_LENGTH)] | None = None
    bare_prompt: Literal["message", "text"] | None = None
    """How a prompt without messages is read: as a user message for the chat template, or as text to complete.
    None (bundles of edgelm 0.1) means a message if there is a chat template."""
    special_tokens: Annotated[Mapping[_Text, _Text], Length(0, MAX_ENTRIES)] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)
    quality: Mapping[str, Any] | None = None
    """What the export measured against the unquantized checkpoint."""
    self_check: Mapping[str, Any] | None = None
    """The same on a few hundred tokens of sample text; every quantized export measures it."""
    vocabulary: Mapping[str, Any] | None = None
    """Result of vocabulary pruning; the file `vocabulary.json` lists the old ids of the kept tokens."""
    adapter: str | None = None
    """Name of the LoRA adapter that was merged."""
    via: Literal["native", "optimum"] = "native"
    long_from: _Context | None = None
    """A sequence longer than this uses the second half of the rotary tables (LongRoPE)."""
    prefix: StaticPrefix | None = None
    notes: Annotated[tuple[_Text, ...], Length(0, MAX_FILES)] = ()
    """Facts for the user, one sentence each: an omitted part, weights read from a quantized file."""
    needs_onnxruntime: _Version | None = None
    """Oldest onnxruntime version that runs the graph correctly, such as "1.28"; None: any that edgelm supports."""
    graph: _FileName = "model.onnx"
    files: Annotated[Mapping[_FileName, BundleFile], Length(0, MAX_FILES)] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def prompts_are_messages(self) -> bool:
        """Whether a prompt without messages is a user message for the chat template."""
        return self.chat_template is not None and self.bare_prompt != "text"

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits per weight of all matrices, scales and zero points included."""
        weights = sum(matrix.rows * matrix.columns for matrix in self.matrices)
        return 8 * sum(matrix.bytes() for matrix in self.matrices) / max(weights, 1)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the manifest's canonical JSON; it depends on the hash of every file."""
        return hashlib.sha256(dump_manifest(self).encode()).hexdigest()

    @property
    def weights_digest(self) -> str:
        """SHA-256 (hex) of the hashes of the graph and its data: the files whose names begin with the graph's name."""
        names = sorted(name for name in self.files if name.startswith(self.graph))
        return hashlib.sha256("\n".join(self.files[name].sha256 for name in names).encode()).hexdigest()


def dump_manifest(manifest: Manifest) -> str:
    """Return the canonical JSON text of a manifest: equal manifests give equal bytes."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
