"""Keys and values of a bundle's static prefix: a file that the bundle's own graph computes once and loading maps.

The file is the array [layers, 2, kv_heads, n, head_size] of the n tokens, keys before values, little-endian, of the
cache's own type, nothing else; the manifest's `prefix` says which tokens and which weights. Its name holds the
beginning of its SHA-256, so that a new prefix never touches the file that the present manifest names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgelm.bundle.bundle_folder import Bundle, open_bundle
from edgelm.bundle.manifest import MANIFEST, BundleFile, Manifest, StaticPrefix, dump_manifest
from edgelm.errors import BundleError, EdgelmError
from edgelm.runtime.kv_cache import KvSegment, Tokens
from edgelm.runtime.memory_plan import PREFILL_CHUNK
from edgelm.runtime.runner import open_runner
from edgelm.text.static_prompt import check_prefix_tokens

PREFIX_FILE_PATTERN: Final = re.compile(r"prefix-[0-9a-f]{16}\.kv")
NEW: Final = ".new"
"""Ends the name of a file that is still being written."""


def map_prefix(bundle: Bundle) -> tuple[Tokens, KvSegment] | None:
    """Return a bundle's static prefix, int32 [n], and its keys and values, read from the file where they are used.

    Raises `BundleError` when the file is missing or of another size than its tokens need.
    """
    prefix, cache = bundle.manifest.prefix, bundle.manifest.cache
    if prefix is None:
        return None
    shape = (2 * cache.layers, cache.kv_heads, len(prefix.tokens), cache.head_size)
    dtype = np.dtype(prefix.dtype).newbyteorder("<")
    file, expected = bundle.path / prefix.file, int(np.prod(shape)) * dtype.itemsize
    try:
        size = file.stat().st_size
        if size != expected:
            raise BundleError(f"{file} is damaged: {len(prefix.tokens)} tokens take {expected} bytes, it has {size}")
        mapped: Any = np.asarray(np.memmap(file, dtype, "r", shape=shape))
    except OSError as error:
        raise BundleError(f"{file} cannot be mapped: {error.strerror or error}") from error
    return np.array(prefix.tokens, np.int32), list(mapped)


def open_without_prefix(path: str | Path) -> Bundle:
    """Open a bundle as if it had no static prefix, whatever state that is in. Raises `BundleError`."""
    bundle = open_bundle(path, verify=False)
    bare = Bundle(bundle.path, _without_prefix(bundle.manifest))
    bare.verify()
    return bare


def add_prefix(bundle: Bundle, tokens: Sequence[int], *, threads: int | None = None) -> Bundle:
    """Compute the keys and values of `tokens`, and make them the bundle's static prefix in place of any other.

    Until the manifest is replaced, the last step, the bundle is what it was; a failure leaves it so. Raises
    `EdgelmError` for tokens that no prompt can begin with and for a bundle that cannot be written.
    """
    manifest = _without_prefix(bundle.manifest)
    check_prefix_tokens(tokens, context=manifest.context, vocab_size=manifest.vocab_size, long_from=manifest.long_from)
    piece = _compute(Bundle(bundle.path, manifest), tokens, threads)
    try:
        name, file = _write(bundle.path, piece)
        dtype: Any = piece[0].dtype.name
        prefix = StaticPrefix(tuple(tokens), name, dtype, manifest.weights_digest)
        manifest = replace(manifest, prefix=prefix, files={**manifest.files, name: file})
        return _publish(bundle.path, manifest)
    except OSError as error:
        raise EdgelmError(f"{bundle.path} cannot be written: {error.strerror or error}") from error
    finally:
        _remove_stale_files(bundle.path)


def remove_prefix(bundle: Bundle) -> Bundle:
    """Take the static prefix out of a bundle. Raises `EdgelmError` when it has none or cannot be written."""
    if bundle.manifest.prefix is None:
        raise EdgelmError(f"{bundle.path} has no static prefix")
    try:
        return _publish(bundle.path, _without_prefix(bundle.manifest))
    except OSError as error:
        raise EdgelmError(f"{bundle.path} cannot be written: {error.strerror or error}") from error
    finally:
        _remove_stale_files(bundle.path)


def _without_prefix(manifest: Manifest) -> Manifest:
    own = None if manifest.prefix is None else manifest.prefix.file
    return replace(manifest, prefix=None, files={name: file for name, file in manifest.files.items() if name != own})


def _compute(bundle: Bundle, tokens: Sequence[int], threads: int | None) -> KvSegment:
    runner = open_runner(bundle, rows=1, threads=threads, context=len(tokens))
    ids = np.array(tokens, np.int64)
    for start in range(0, len(ids), PREFILL_CHUNK):
        runner.prefill(0, ids[start : start + PREFILL_CHUNK], start)
    return runner.read_row(0, 0, len(ids))


def _write(root: Path, piece: KvSegment) -> tuple[str, BundleFile]:
    """Write keys and values under a name of their own; return it."""
    digest, size = hashlib.sha256(), 0
    new = root / f"prefix{NEW}"
    with new.open("wb") as stream:
        for array in piece:
            content = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
            stream.write(content)
            digest.update(content)
            size += len(content)
        stream.flush()
        os.fsync(stream.fileno())
    name = f"prefix-{digest.hexdigest()[:16]}.kv"
    new.replace(root / name)
    return name, BundleFile(size, digest.hexdigest())


def _publish(root: Path, manifest: Manifest) -> Bundle:
    """Put a manifest in the place of the present one, in one step."""
    new = root / f"{MANIFEST}{NEW}"
    with new.open("w", encoding="utf-8") as stream:
        stream.write(dump_manifest(manifest))
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(root / MANIFEST)
    return Bundle(root, manifest)


def _remove_stale_files(root: Path) -> None:
    """Remove what the manifest does not name: the prefix of before, or what a failure or a power cut left."""
    with suppress(OSError, BundleError):
        kept = open_bundle(root, verify=False).manifest.files
        unfinished = [root / f"prefix{NEW}", root / f"{MANIFEST}{NEW}"]
        for file in [*unfinished, *root.iterdir()]:
            if file in unfinished or (PREFIX_FILE_PATTERN.fullmatch(file.name) and file.name not in kept):
                with suppress(OSError):
                    file.unlink()
