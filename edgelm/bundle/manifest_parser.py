"""Reads a manifest from untrusted JSON: checks types, ranges, file names and the static prefix. Opens no files."""

from __future__ import annotations

import json
from typing import Any, Final

from edgelm.bundle.manifest import SCHEMA, Manifest, StaticPrefix
from edgelm.errors import BundleError, RequestError
from edgelm.validation import FieldError, read

_REQUIRED: Final = ("files", "graph", "sampling")
"""Keys that must be in the JSON although the dataclass has defaults for writers."""


def parse_manifest(text: str, source: str) -> Manifest:
    """Return the manifest in a JSON text; `source` names it in errors.

    Raises `BundleError` if the text is not JSON, its schema is newer than `SCHEMA`, or a value is not allowed.
    """
    try:
        raw = json.loads(text, object_pairs_hook=_refuse_duplicates)
        if "\\u" in text:
            json.dumps(raw, ensure_ascii=False).encode()  # raises for an unpaired surrogate
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{source} is not JSON: {error}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{source} is not a manifest of edgelm: it has no schema number")
    if schema > SCHEMA:
        raise BundleError(f"{source} has schema {schema}; this edgelm reads schemas up to {SCHEMA}: upgrade edgelm")
    fault = _find_missing(raw)
    if fault is None:
        try:
            manifest = read(Manifest, raw)
            fault = _find_contradiction(manifest)
        except (FieldError, RequestError) as error:
            fault = str(error)
    if fault is not None:
        raise BundleError(f"{source} is damaged: {fault}; export or copy the bundle again")
    return manifest


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises `ValueError` if a key occurs twice: readers differ in the value that they use."""
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {duplicate!r:.80} occurs twice in one object")
    return table


def _find_missing(raw: dict[str, Any]) -> str | None:
    missing = [name for name in _REQUIRED if name not in raw]
    sampling = raw.get("sampling")
    if isinstance(sampling, dict) and "stop" not in sampling:
        missing.append("sampling.stop")
    return f"{', '.join(missing)} is missing" if missing else None


def _find_contradiction(manifest: Manifest) -> str | None:
    """Return the values that contradict each other, as text, or None."""
    cache, last = manifest.cache, manifest.vocab_size - 1
    if cache.kind == "growing" and cache.bits != 32:
        return f"a growing cache has 32 bits, not {cache.bits}"
    tokens = [] if manifest.bos_token is None else [manifest.bos_token]
    for token in (*tokens, *manifest.eos_tokens):
        if not 0 <= token <= last:
            return f"bos_token and eos_tokens must be in [0, {last}], got {token}"
    if manifest.prefix is not None and not _is_valid_prefix(manifest.prefix, manifest):
        return (
            "the static prefix has no listed file, no tokens, tokens outside the vocabulary, or as many tokens as the"
            " context"
        )
    return None


def _is_valid_prefix(prefix: StaticPrefix, manifest: Manifest) -> bool:
    return (
        prefix.file in manifest.files
        and 1 <= len(prefix.tokens) < manifest.context
        and all(0 <= token < manifest.vocab_size for token in prefix.tokens)
    )
