"""The file of a static prefix's keys and values: the bundle's own graph computes it once, loading maps it.

The file holds only the array [layers, 2, kv_heads, n, head_size] of the n tokens, keys before values, little-endian, of
the KV cache's type; the manifest's `prefix` names the tokens and the weights. The file name contains the beginning of
the file's SHA-256, so that a new prefix never overwrites the file that the current manifest names.
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
from edgelm.system.files import replace_file
from edgelm.text.static_prompt import check_prefix_tokens

PREFIX_FILE_PATTERN: Final = re.compile(r"prefix-[0-9a-f]{16}\.kv")
"""Name of a prefix file."""
NEW: Final = ".new"
"""Suffix of files that are being written."""


def map_prefix(bundle: Bundle) -> tuple[Tokens, KvSegment] | None:
    """Return the tokens of a bundle's static prefix, int32 [n], and its keys and values, mapped from the file.

    None if the bundle has no static prefix. Raises `BundleError` if the file is missing or has the wrong size.
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
            raise BundleError(f"{file} is damaged: {len(prefix.tokens)} tokens need {expected} bytes, it has {size}")
        mapped: Any = np.asarray(np.memmap(file, dtype, "r", shape=shape))
    except OSError as error:
        raise BundleError(f"{file} cannot be mapped: {error.strerror or error}") from error
    return np.array(prefix.tokens, np.int32), list(mapped)


def open_without_prefix(path: str | Path) -> Bundle:
    """Open a bundle without its static prefix, which may be damaged. Raises `BundleError` if another part is."""
    bundle = open_bundle(path, verify=False)
    bundle = Bundle(bundle.path, _without_prefix(bundle.manifest))
    bundle.verify()
    return bundle


def add_prefix(bundle: Bundle, tokens: Sequence[int], *, threads: int | None = None) -> Bundle:
    """Compute the keys and values of `tokens`, and make them the bundle's static prefix in place of an earlier one.

    Replacing the manifest is the last step; a failure before it leaves the bundle unchanged. Raises `EdgelmError` if no
    prompt can begin with the tokens, or if the bundle cannot be written.
    """
    manifest = _without_prefix(bundle.manifest)
    check_prefix_tokens(tokens, context=manifest.context, vocab_size=manifest.vocab_size, long_from=manifest.long_from)
    segment = _compute(Bundle(bundle.path, manifest), tokens, threads)
    try:
        name, file = _write(bundle.path, segment)
        dtype: Any = segment[0].dtype.name
        prefix = StaticPrefix(tuple(tokens), name, dtype, manifest.weights_digest)
        manifest = replace(manifest, prefix=prefix, files={**manifest.files, name: file})
        return _publish(bundle.path, manifest)
    except OSError as error:
        raise EdgelmError(f"{bundle.path} cannot be written: {error.strerror or error}") from error
    finally:
        _remove_stale_files(bundle.path)


def remove_prefix(bundle: Bundle) -> Bundle:
    """Remove a bundle's static prefix. Raises `EdgelmError` if there is none or the bundle cannot be written."""
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


def _write(root: Path, segment: KvSegment) -> tuple[str, BundleFile]:
    """Write keys and values to a file that is named after its hash; return its name and manifest entry."""
    digest, size = hashlib.sha256(), 0
    new = root / f"prefix{NEW}"
    with new.open("wb") as stream:
        for array in segment:
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
    """Replace the manifest atomically."""
    replace_file(root / MANIFEST, dump_manifest(manifest), scratch=root / f"{MANIFEST}{NEW}")
    return Bundle(root, manifest)


def _remove_stale_files(root: Path) -> None:
    """Remove prefix files that the manifest does not list, and files left by a failure or a power cut."""
    with suppress(OSError, BundleError):
        kept = open_bundle(root, verify=False).manifest.files
        unfinished = [root / f"prefix{NEW}", root / f"{MANIFEST}{NEW}"]
        for file in [*unfinished, *root.iterdir()]:
            if file in unfinished or (PREFIX_FILE_PATTERN.fullmatch(file.name) and file.name not in kept):
                with suppress(OSError):
                    file.unlink()
