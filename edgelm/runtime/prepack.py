"""Packs a bundle's weights for this board's kernels: once, into the board cache; later loads map the file.

Mapped weights are pages of a file, which processes share and the system can drop, instead of private memory. Quantized
matrices are packed for our own kernels (`edgelm.kernels`), which are compiled for the processor. If there are none for
the processor or the bundle, onnxruntime saves the layout of its own kernels
(session.save_external_prepacked_constant_initializers).
"""

from __future__ import annotations

import logging
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from edgelm.bundle.bundle_folder import Bundle, open_bundle
from edgelm.errors import BundleError, EdgelmError
from edgelm.graph.graph_check import check_graph
from edgelm.kernels.abi import WeightFormat
from edgelm.kernels.custom_ops import LIBRARIES, CustomOpLibrary
from edgelm.kernels.rewrite.graph_rewriter import DATA, is_row_wise, rewrite_graph
from edgelm.runtime.ort import (
    ORT_VERSION,
    PACKED_GRAPH_FILE,
    Graph,
    adapt_to_ort_version,
    cache_key,
    check_ort_version,
    load_graph,
    load_packed,
    mark_invariant,
    summarize_error,
)
from edgelm.runtime.probe import PASS_SIZES, check_divergence, compute_probe_logits
from edgelm.runtime.threads import ThreadSettings, count_cores, default_threads
from edgelm.system.board_cache import BoardCache, CacheEntry, file_signatures
from edgelm.system.digest import file_sha256
from edgelm.system.isolated_python import build_python_command

MIN_CACHED_BYTES: Final = 16_000_000
"""Smaller bundles are not cached: loading them takes less time than the look-up."""

MAX_CACHE_RATIO: Final = 3
"""Maximum size of an entry, in bytes of the bundle: weights, packed weights, scales in float32, a copy of the head."""

KERNELS: Final = "kernels.so"
FORMATS: Final = "formats"
"""Metadata key of an entry: the formats of its compiled kernels."""

UNUSABLE: Final = "unusable"
"""Metadata key of an entry: why the bundle's weights cannot be cached."""

LOG: Final = logging.getLogger(__name__)


def open_verified(path: str | Path, cache: BoardCache | None) -> Bundle:
    """Open a bundle and verify its files, except those that have not changed since they were packed for this board.

    Raises `BundleError` as `open_bundle` does.
    """
    bundle = open_bundle(path, verify=False)
    if cache is None or not _is_cacheable(bundle):
        bundle.verify()
        return bundle
    key = cache_key(bundle, "weights")
    entry = cache.find(key)
    known = _unchanged(bundle, entry) if entry is not None else []
    bundle.verify(known)
    if entry is not None and len(known) < len(_graph_files(bundle)):  # a copy of the bundle, or one that was touched
        cache.update(
            key, {**entry.metadata, "bundle": str(bundle.path), "files": file_signatures(_graph_files(bundle))}
        )
    return bundle


def open_graph(
    bundle: Bundle, tuning: ThreadSettings, cache: BoardCache | None = None, profile_prefix: Path | None = None
) -> Graph:
    """Load a bundle's graph, from the board cache if there is one.

    With `profile_prefix` every run is profiled; `end_profiling` writes the profile to a file whose path begins with the
    prefix, and returns its name. Raises `BundleError` if onnxruntime refuses the graph or is older than the bundle
    needs, and `EdgelmError` if `threads` is out of range.
    """
    check_ort_version(bundle.manifest.needs_onnxruntime, bundle.path)
    if tuning.threads > count_cores():
        LOG.warning("%d threads on %d cores: more threads than cores slow it down", tuning.threads, count_cores())
    if cache is not None and _is_cacheable(bundle):
        graph = _load_or_pack(bundle, tuning, cache, profile_prefix)
        if graph is not None:
            return graph
    try:
        if not bundle.is_builtin:  # the check imports protobuf, which takes 11 ms and 4 MB
            check_graph(bundle)
        return load_graph(str(bundle.graph), tuning.threads, spin=tuning.spin, profile_prefix=profile_prefix)
    except EdgelmError:
        raise
    except Exception as error:  # onnxruntime raises types of its own, unrelated to each other
        raise BundleError(f"onnxruntime {ORT_VERSION} cannot load {bundle.graph}: {summarize_error(error)}") from error


def _is_cacheable(bundle: Bundle) -> bool:
    """Return whether weights are cached. Not float32: onnxruntime would store two copies as large as the bundle."""
    is_small = bundle.bytes < MIN_CACHED_BYTES or bundle.manifest.quant == "fp32"
    return not is_small and bundle.manifest.cache.kind == "shared"


def _load_or_pack(
    bundle: Bundle, tuning: ThreadSettings, cache: BoardCache, profile_prefix: Path | None
) -> Graph | None:
    """Load the packed graph, which is made first if the cache does not have it; None if it cannot be cached."""
    key = cache_key(bundle, "weights")
    entry = cache.find(key)
    if entry is not None and UNUSABLE not in entry.metadata:
        graph = _load_cached(entry, tuning, profile_prefix)
        if graph is not None:
            return graph
        cache.drop(key)
        entry = None
    if entry is None:
        check_graph(bundle)  # entries found later were checked here: the key holds the digest of graph and data
        entry = cache.make(key, MAX_CACHE_RATIO * bundle.bytes, lambda folder: _pack(bundle, tuning, folder))
        if entry is not None and UNUSABLE in entry.metadata:
            LOG.warning("the weights of %s are not cached: %s", bundle.path, entry.metadata[UNUSABLE])
    return _load_cached(entry, tuning, profile_prefix) if entry is not None and UNUSABLE not in entry.metadata else None


def _load_cached(entry: CacheEntry, tuning: ThreadSettings, profile_prefix: Path | None) -> Graph | None:
    try:
        formats = [WeightFormat(*fmt) for fmt in entry.metadata.get(FORMATS, [])]
        library = None
        if formats:
            sha256 = str(entry.sha256.get(KERNELS))
            library = LIBRARIES.open(entry.path / KERNELS, formats, entry.path / DATA, sha256)
        return load_packed(entry.path, tuning, library, profile_prefix)
    except Exception as error:  # noqa: BLE001  the bundle itself is loaded instead
        LOG.warning("%s in the board cache is not used: %s", entry.path, summarize_error(error))
        return None


# --- packing ---


def _pack(bundle: Bundle, tuning: ThreadSettings, folder: Path) -> Mapping[str, Any]:
    """Write a bundle's graph with packed weights into a folder; return the metadata of the cache entry.

    Raises `OSError` if onnxruntime cannot write or read the copy.
    """
    started = time.perf_counter()
    metadata: dict[str, Any] = {"bundle": str(bundle.path), "files": file_signatures(_graph_files(bundle))}
    unusable = None
    try:
        formats = _try_native_kernels(bundle, tuning, folder)
        if formats:
            metadata[FORMATS] = [[fmt.bits, fmt.block_size] for fmt in formats]
        else:
            unusable = _prepack(bundle, tuning, folder)
    except Exception as error:  # if the bundle itself is at fault, loading it without the cache reports that
        raise OSError(f"onnxruntime cannot save packed weights: {summarize_error(error)}") from error
    if unusable is not None:
        _remove_files(folder)
        return metadata | {UNUSABLE: unusable}
    LOG.info("packed %s for this board in %.1f s: %s", bundle.path, time.perf_counter() - started, folder.parent)
    return metadata


def _try_native_kernels(bundle: Bundle, tuning: ThreadSettings, folder: Path) -> list[WeightFormat]:
    """Write a graph for our kernels and compile them; return no formats and leave no files if that is impossible."""
    try:
        return _build_native_graph(bundle, tuning, folder)
    except EdgelmError as error:
        LOG.warning("edgelm's own kernels are not used for %s: %s", bundle.path, error)
    except Exception as error:  # noqa: BLE001  onnxruntime's kernels are used instead
        LOG.info("edgelm's own kernels are not used for %s: %s", bundle.path, summarize_error(error))
    _remove_files(folder)
    return []


def _build_native_graph(bundle: Bundle, tuning: ThreadSettings, folder: Path) -> list[WeightFormat]:
    """Write a graph for our kernels, compile them, and compare their results with those of onnxruntime's kernels.

    Returns no formats if there are no kernels for any of the bundle's matrices. Raises `EdgelmError` if the results
    differ too much, and any exception of compiling or loading.
    """
    formats = rewrite_graph(bundle.graph.read_bytes(), bundle.graph.with_name(f"{bundle.graph.name}.data"), folder)
    if not formats:
        return []
    graph = folder / PACKED_GRAPH_FILE
    graph.write_bytes(adapt_to_ort_version(graph.read_bytes()))
    _compile(folder / KERNELS, formats)
    library = folder / KERNELS
    operators = CustomOpLibrary(library, formats, folder / DATA, file_sha256(library))  # not shared: renamed later
    ours = load_packed(folder, tuning, operators)
    found = compute_probe_logits(ours, bundle.manifest)
    is_invariant = is_row_wise(graph.read_bytes()) and np.array_equal(
        found, compute_probe_logits(ours, bundle.manifest, PASS_SIZES)
    )
    del ours  # before the next one is loaded: each can take as much memory as the bundle
    expected = compute_probe_logits(load_graph(str(bundle.graph), tuning.threads, spin=tuning.spin), bundle.manifest)
    exact = compute_probe_logits(
        load_graph(str(bundle.graph), tuning.threads, spin=tuning.spin, exact=True), bundle.manifest
    )
    own, theirs = check_divergence(found, expected, exact)
    LOG.debug("%s: %.3g nats from exact activations, onnxruntime's kernels %.3g", bundle.path, own, theirs)
    if is_invariant:
        graph.write_bytes(mark_invariant(graph.read_bytes()))
    return formats


def verify_kernels(bundle: Bundle, threads: int | None = None) -> str:
    """Compile our kernels for a bundle on this board and compare their results with those of onnxruntime's kernels.

    Returns a summary in one line. Raises `EdgelmError` if the results differ too much, and `OSError` with the reason if
    there are no kernels for the board or the bundle.
    """
    started = time.perf_counter()
    check_graph(bundle)
    with tempfile.TemporaryDirectory(prefix="edgelm-kernels-") as folder:
        try:
            formats = _build_native_graph(bundle, ThreadSettings(threads or default_threads()), Path(folder))
        except (EdgelmError, OSError):
            raise
        except Exception as error:
            raise OSError(summarize_error(error)) from error
    if not formats:
        raise OSError(f"there are no kernels for {bundle.manifest.quant} matrices")
    block_sizes: dict[int, list[str]] = {}
    for fmt in formats:
        block_sizes.setdefault(fmt.bits, []).append(str(fmt.block_size))
    kinds = " and ".join(f"int{bits} in blocks of {', '.join(sizes)}" for bits, sizes in block_sizes.items())
    return f"compiled for {kinds} in {time.perf_counter() - started:.1f} s; the results match those of onnxruntime"


def _compile(library: Path, formats: list[WeightFormat]) -> None:
    """Compile kernels in a separate process. Raises `OSError` with the reason if that fails."""
    arguments = [f"{fmt.bits}:{fmt.block_size}" for fmt in formats]
    command = build_python_command("edgelm.kernels.compiler", "main", str(library.absolute()), *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"the kernels cannot be compiled: {(done.stderr.strip() or 'killed').splitlines()[-1]}")


def _prepack(bundle: Bundle, tuning: ThreadSettings, folder: Path) -> str | None:
    """Have onnxruntime write a graph with its own packed weights; return why it is unusable, None if it is usable.

    The copy must compute exactly the same bits as the original: onnxruntime 1.31 appends packed weights to the original
    ones, where kernels that need an alignment of 64 bytes read wrong data if the matrix in front has another size.
    """
    expected = compute_probe_logits(load_graph(str(bundle.graph), tuning.threads, save_to=folder), bundle.manifest)
    # the first graph is freed by now: two would take twice the memory
    found = compute_probe_logits(load_packed(folder, tuning), bundle.manifest)
    if np.array_equal(expected, found):
        return None
    return f"onnxruntime {ORT_VERSION} computes other results with the weights that it packed"


def _remove_files(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _graph_files(bundle: Bundle) -> dict[str, Path]:
    """Return the bundle's graph files, which the packed graph replaces, by name."""
    names = [name for name in bundle.manifest.files if name.startswith(bundle.manifest.graph)]
    return {name: bundle.path / name for name in names}


def _unchanged(bundle: Bundle, entry: CacheEntry) -> list[str]:
    """Return the names of files that were verified when the entry was made and have the same signature now."""
    try:
        now = file_signatures(_graph_files(bundle))
    except OSError:
        return []
    known = entry.metadata.get("files")
    return [name for name, seen in now.items() if isinstance(known, dict) and known.get(name) == seen]
