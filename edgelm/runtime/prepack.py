"""A bundle's weights as this board's kernels want them, packed once and mapped from then on.

What would be private memory becomes pages of a file, which processes share and the system may drop. Quantized matrices
are laid out for kernels of our own (`edgelm.kernels`), compiled for the processor. Where there are none for it, or for
the bundle, onnxruntime's kernels keep a layout of theirs (session.save_external_prepacked_constant_initializers).
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
from edgelm.kernels.custom_ops import CustomOpLibrary
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
"""Bundles smaller than this are quicker loaded than looked up."""

MAX_CACHE_RATIO: Final = 3
"""Most bytes that are kept for each byte of a bundle: its weights, packed weights, scales in float32, a head's copy."""

KERNELS: Final = "kernels.so"
FORMATS: Final = "formats"
"""Key of a note that says which kernels an entry has."""

UNUSABLE: Final = "unusable"
"""Key of a note that says why a bundle's weights cannot be kept."""

LOG: Final = logging.getLogger(__name__)

_operators: dict[tuple[Path, int, int], CustomOpLibrary] = {}
"""Libraries in use, which stay: graphs refer to them. By their folder, and by the file of matrices that it has now."""


def open_verified(path: str | Path, cache: BoardCache | None) -> Bundle:
    """Open a bundle and check its files, but for those that have not changed since they were packed for this board.

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
    if entry is not None and len(known) < len(_files(bundle)):  # a copy of the bundle, or one that was touched
        cache.update(key, {**entry.metadata, "bundle": str(bundle.path), "files": file_signatures(_files(bundle))})
    return bundle


def open_graph(
    bundle: Bundle, tuning: ThreadSettings, cache: BoardCache | None = None, profile_prefix: Path | None = None
) -> Graph:
    """Load a bundle's graph, through the cache where there is one.

    With `profile_prefix` every run is profiled, into a file whose path begins so; `end_profiling` writes it and
    returns its
    name. Raises `BundleError` when onnxruntime refuses the graph or is older than the bundle needs, and `EdgelmError`
    when `threads` is out of range.
    """
    check_ort_version(bundle.manifest.needs_onnxruntime, bundle.path)
    if tuning.threads > count_cores():
        LOG.warning("%d threads on %d cores: more threads than cores make it slower", tuning.threads, count_cores())
    if cache is not None and _is_cacheable(bundle):
        graph = _load_or_pack(bundle, tuning, cache, profile_prefix)
        if graph is not None:
            return graph
    try:
        check_graph(bundle)
        return load_graph(str(bundle.graph), tuning.threads, spin=tuning.spin, profile_prefix=profile_prefix)
    except EdgelmError:
        raise
    except Exception as error:  # onnxruntime raises types of its own, unrelated to each other
        raise BundleError(f"onnxruntime {ORT_VERSION} cannot load {bundle.graph}: {summarize_error(error)}") from error


def _is_cacheable(bundle: Bundle) -> bool:
    """Whether weights are kept: not float32, of which onnxruntime would keep two copies as large as the bundle."""
    is_small = bundle.bytes < MIN_CACHED_BYTES or bundle.manifest.quant == "fp32"
    return not is_small and bundle.manifest.cache.kind == "shared"


def _load_or_pack(
    bundle: Bundle, tuning: ThreadSettings, cache: BoardCache, profile_prefix: Path | None
) -> Graph | None:
    """Load what was packed before, or pack it now; return None where the cache cannot keep it."""
    key = cache_key(bundle, "weights")
    entry = cache.find(key)
    if entry is not None and UNUSABLE not in entry.metadata:
        graph = _load_cached(entry, tuning, profile_prefix)
        if graph is not None:
            return graph
        cache.drop(key)
        entry = None
    if entry is None:
        check_graph(bundle)  # what is kept was checked then: the key holds the digest of graph and data
        entry = cache.make(key, MAX_CACHE_RATIO * bundle.bytes, lambda folder: _pack(bundle, tuning, folder))
        if entry is not None and UNUSABLE in entry.metadata:
            LOG.warning("the weights of %s stay in private memory: %s", bundle.path, entry.metadata[UNUSABLE])
    return _load_cached(entry, tuning, profile_prefix) if entry is not None and UNUSABLE not in entry.metadata else None


def _load_cached(entry: CacheEntry, tuning: ThreadSettings, profile_prefix: Path | None) -> Graph | None:
    try:
        formats = [WeightFormat(*fmt) for fmt in entry.metadata.get(FORMATS, [])]
        return load_packed(entry.path, tuning, _operators_in(entry, formats), profile_prefix)
    except Exception as error:  # noqa: BLE001  whatever onnxruntime dislikes about it: the bundle itself is there
        LOG.warning("%s in the board cache is not used: %s", entry.path, summarize_error(error))
        return None


def _operators_in(entry: CacheEntry, formats: list[WeightFormat]) -> CustomOpLibrary | None:
    """Return the operators of an entry, opened once; None where it has none.

    Raises `EdgelmError` when the library is not the one that was compiled for the entry.
    """
    if not formats:
        return None
    folder = entry.path
    data = (folder / DATA).stat()
    key = (folder, data.st_ino, data.st_mtime_ns)
    if key not in _operators:
        _operators[key] = CustomOpLibrary(folder / KERNELS, formats, folder / DATA, str(entry.sha256.get(KERNELS)))
    return _operators[key]


# --- making ---


def _pack(bundle: Bundle, tuning: ThreadSettings, folder: Path) -> Mapping[str, Any]:
    """Write a bundle's graph with packed weights into a folder; return the note that goes with them.

    Raises `OSError` where onnxruntime cannot write or read the copy.
    """
    started = time.perf_counter()
    note: dict[str, Any] = {"bundle": str(bundle.path), "files": file_signatures(_files(bundle))}
    unusable = None
    try:
        formats = _try_native_kernels(bundle, tuning, folder)
        if formats:
            note[FORMATS] = [[fmt.bits, fmt.block_size] for fmt in formats]
        else:
            unusable = _prepack(bundle, tuning, folder)
    except Exception as error:  # a bundle that cannot be loaded will say so without a cache
        raise OSError(f"onnxruntime cannot keep packed weights: {summarize_error(error)}") from error
    if unusable is not None:
        _empty(folder)
        return note | {UNUSABLE: unusable}
    LOG.info("packed %s for this board in %.1f s: %s", bundle.path, time.perf_counter() - started, folder.parent)
    return note


def _try_native_kernels(bundle: Bundle, tuning: ThreadSettings, folder: Path) -> list[WeightFormat]:
    """Write a graph for our kernels and compile them; return no formats, and leave nothing, where that cannot be."""
    try:
        return _build_native_graph(bundle, tuning, folder)
    except EdgelmError as error:
        LOG.warning("edgelm's own kernels are not used for %s: %s", bundle.path, error)
    except Exception as error:  # noqa: BLE001  whatever is missing: onnxruntime's kernels are there
        LOG.info("edgelm's own kernels are not used for %s: %s", bundle.path, summarize_error(error))
    _empty(folder)
    return []


def _build_native_graph(bundle: Bundle, tuning: ThreadSettings, folder: Path) -> list[WeightFormat]:
    """Write a graph for our kernels, compile them, and see whether they compute what onnxruntime's do.

    Returns no formats where there are no kernels for any of the bundle's matrices. Raises `EdgelmError` when they
    compute something else, and whatever keeps them from being compiled or loaded.
    """
    formats = rewrite_graph(bundle.graph.read_bytes(), bundle.graph.with_name(f"{bundle.graph.name}.data"), folder)
    if not formats:
        return []
    graph = folder / PACKED_GRAPH_FILE
    graph.write_bytes(adapt_to_ort_version(graph.read_bytes()))
    _compile(folder / KERNELS, formats)
    # Not kept in `_operators`: the folder is renamed.
    library = folder / KERNELS
    ours = load_packed(folder, tuning, CustomOpLibrary(library, formats, folder / DATA, file_sha256(library)))
    found = compute_probe_logits(ours, bundle.manifest)
    same = is_row_wise(graph.read_bytes()) and np.array_equal(
        found, compute_probe_logits(ours, bundle.manifest, PASS_SIZES)
    )
    del ours  # one at a time: each may take as much memory as the bundle
    expected = compute_probe_logits(load_graph(str(bundle.graph), tuning.threads, spin=tuning.spin), bundle.manifest)
    exact = compute_probe_logits(
        load_graph(str(bundle.graph), tuning.threads, spin=tuning.spin, exact=True), bundle.manifest
    )
    own, theirs = check_divergence(found, expected, exact)
    LOG.debug("%s: %.3g nats from exact activations, onnxruntime's kernels %.3g", bundle.path, own, theirs)
    if same:
        graph.write_bytes(mark_invariant(graph.read_bytes()))
    return formats


def verify_kernels(bundle: Bundle, threads: int | None = None) -> str:
    """Compile our kernels for a bundle on this board and compare what they compute with onnxruntime's.

    Returns what was done, in one line. Raises `EdgelmError` where they compute something else, and `OSError` with the
    reason where this board cannot have them.
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
        raise OSError(f"there are none for matrices of {bundle.manifest.quant}")
    blocks: dict[int, list[str]] = {}
    for fmt in formats:
        blocks.setdefault(fmt.bits, []).append(str(fmt.block_size))
    kinds = " and ".join(f"int{bits} in blocks of {', '.join(sizes)}" for bits, sizes in blocks.items())
    return f"compiled for {kinds} in {time.perf_counter() - started:.1f} s; they compute what onnxruntime's do"


def _compile(library: Path, formats: list[WeightFormat]) -> None:
    """Compile kernels in a process of their own. Raises `OSError` with the reason where that fails."""
    forms = [f"{fmt.bits}:{fmt.block_size}" for fmt in formats]
    command = build_python_command("edgelm.kernels.compiler", "main", str(library.absolute()), *forms)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"the kernels cannot be compiled: {(done.stderr.strip() or 'killed').splitlines()[-1]}")


def _prepack(bundle: Bundle, tuning: ThreadSettings, folder: Path) -> str | None:
    """Have onnxruntime write a graph with its own packed weights; return why it cannot be used.

    A copy that does not compute what the original does, to the last bit, is none: onnxruntime 1.31 puts packed weights
    behind the original ones, where kernels that want them aligned to 64 bytes misread those behind a matrix of another
    size.
    """
    expected = compute_probe_logits(load_graph(str(bundle.graph), tuning.threads, save_to=folder), bundle.manifest)
    found = compute_probe_logits(
        load_packed(folder, tuning), bundle.manifest
    )  # the first one is gone: two would take twice the memory
    if np.array_equal(expected, found):
        return None
    return f"onnxruntime {ORT_VERSION} does not read back what it packed"


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _files(bundle: Bundle) -> dict[str, Path]:
    """Return the files that the packed graph stands for."""
    names = [name for name in bundle.manifest.files if name.startswith(bundle.manifest.graph)]
    return {name: bundle.path / name for name in names}


def _unchanged(bundle: Bundle, entry: CacheEntry) -> list[str]:
    """Return the names of files that were verified when the entry was made and look the same now."""
    try:
        now = file_signatures(_files(bundle))
    except OSError:
        return []
    known = entry.metadata.get("files")
    return [name for name, seen in now.items() if isinstance(known, dict) and known.get(name) == seen]
