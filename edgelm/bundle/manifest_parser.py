"""Reads a manifest from untrusted JSON: checks types, ranges, file names and the static prefix. Opens no files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from edgelm.bundle.field_types import check_type
from edgelm.bundle.manifest import SCHEMA, BundleFile, KVCacheShape, Manifest, Matrix, StaticPrefix
from edgelm.errors import BundleError, RequestError
from edgelm.types import SamplingParams

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


def parse_manifest(text: str, source: str) -> Manifest:
    """Return the manifest in a JSON text; `source` names it in errors.

    Raises `BundleError` if the text is not JSON, its schema is newer than `SCHEMA`, or a value is not allowed.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not JSON: {error}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{source} is not a manifest of edgelm: it has no schema number")
    if schema > SCHEMA:
        raise BundleError(f"{source} has schema {schema}; this edgelm reads schemas up to {SCHEMA}: upgrade edgelm")
    try:
        manifest = _build(raw)
        check_type(manifest, Manifest, "the manifest")
    except (KeyError, TypeError, ValueError, AttributeError, RequestError) as error:
        raise BundleError(f"{source} is damaged: {type(error).__name__}: {error}") from error
    for name, value, low, high in _list_ranges(manifest):
        if not low <= value <= high:
            raise BundleError(f"{source} is damaged: {name} must lie in [{low}, {high}], it is {value!r:.40}")
    cache, version = manifest.cache, manifest.needs_onnxruntime
    if cache.kind == "growing" and cache.bits != 32:
        raise BundleError(f"{source} is damaged: a growing cache has 32 bits, not {cache.bits}")
    if version is not None and not re.fullmatch(r"[0-9]+\.[0-9]+", version):
        raise BundleError(f"{source} is damaged: needs_onnxruntime cannot be {version!r:.80}")
    if manifest.prefix is not None and not _is_valid_prefix(manifest.prefix, manifest):
        raise BundleError(
            f"{source} is damaged: the static prefix has no listed file, no tokens, tokens outside the vocabulary,"
            " or as many tokens as the context"
        )
    return manifest


def _build(raw: dict[str, Any]) -> Manifest:
    sampling = dict(raw["sampling"])
    return Manifest(
        **{
            **raw,
            "cache": KVCacheShape(**raw["cache"]),
            "matrices": tuple(Matrix(**matrix) for matrix in _check_list(raw["matrices"])),
            "eos_tokens": tuple(_check_list(raw["eos_tokens"])),
            "sampling": SamplingParams(**{**sampling, "stop": tuple(_check_list(sampling["stop"]))}),
            "prefix": _build_prefix(raw.get("prefix")),
            "notes": tuple(_check_list(raw.get("notes", []))),
            "files": {_check_file_name(name): BundleFile(**file) for name, file in raw["files"].items()},
            "graph": _check_file_name(raw["graph"]),
        }
    )


def _build_prefix(raw: Any) -> StaticPrefix | None:
    if raw is None:
        return None
    return StaticPrefix(**{**raw, "tokens": tuple(_check_list(raw["tokens"]))})


def _check_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.80} is not a list")
    return value


def _check_file_name(name: str) -> str:
    """Return the name. Raises `ValueError` if it could name a place outside the bundle's directory."""
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{name!r} is not a plain file name")
    return name


def _list_ranges(manifest: Manifest) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, value, smallest, largest) of every number and length; types are checked before."""
    cache, vocab_size = manifest.cache, manifest.vocab_size
    yield "context", manifest.context, 1, MAX_CONTEXT
    yield "vocab_size", vocab_size, 1, MAX_VOCAB_SIZE
    yield "cache.layers", cache.layers, 1, MAX_LAYERS
    yield "cache.kv_heads", cache.kv_heads, 1, MAX_HEADS
    yield "cache.head_size", cache.head_size, 1, MAX_HEAD_SIZE
    yield "parameters", manifest.parameters, 0, MAX_SIZE
    tokens = [manifest.bos_token] if manifest.bos_token is not None else []
    yield "the number of eos_tokens", len(manifest.eos_tokens), 0, MAX_ENTRIES
    for token in (*tokens, *manifest.eos_tokens):
        yield "a token", token, 0, vocab_size - 1
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
        yield "the length of a text", len(text), 0, MAX_TEXT_LENGTH


def _is_valid_prefix(prefix: StaticPrefix, manifest: Manifest) -> bool:
    return (
        prefix.file in manifest.files
        and 1 <= len(prefix.tokens) < manifest.context
        and all(0 <= token < manifest.vocab_size for token in prefix.tokens)
    )
