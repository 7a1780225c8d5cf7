"""Loading graphs into onnxruntime: threads, old runtimes' windows, weights that were packed for this board before.

onnxruntime's kernels copy every quantized matrix into a layout of their own when a graph is loaded. `open_graph` lets
it save the result once (session.save_external_prepacked_constant_initializers) and maps it from then on: what was
private memory becomes pages of a file, which processes share and the system may drop.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgelm.boardcache import BoardCache, Entry, Key, signature, this_cpu
from edgelm.bundle import Bundle, open_bundle
from edgelm.errors import BundleError, EdgelmError
from edgelm.tuning import Tuning, cores, default_threads, recall
from edgelm.windows import has_windows, with_old_windows

RUNTIME: Final = tuple(map(int, ort.__version__.split(".")[:2]))
"""This onnxruntime: its major and minor version."""

OLD_WINDOWS: Final = RUNTIME < (1, 24)
"""Whether this onnxruntime sees one position more than a window says."""

WORTH_BYTES: Final = 16_000_000
"""Bundles smaller than this are quicker loaded than looked up."""

GROWTH: Final = 3
"""Most bytes that are kept for each byte of a bundle: its weights, packed weights, scales in float32, a head's copy."""

PACKED: Final = "model.onnx"

UNUSABLE: Final = "unusable"
"""Key of a note that says why a bundle's weights cannot be kept."""

LOG: Final = logging.getLogger(__name__)


def cache_key(bundle: Bundle, kind: str) -> Key:
    """Return what identifies something made from a bundle by this onnxruntime on this processor."""
    return Key(kind, bundle.manifest.weights_digest, ort.__version__, this_cpu())


def open_verified(path: str | Path, cache: BoardCache | None) -> Bundle:
    """Open a bundle and check its files, but for those that have not changed since they were packed for this board.

    Raises `BundleError` as `open_bundle` does.
    """
    bundle = open_bundle(path, verify=False)
    if cache is None or not _is_worth_it(bundle):
        bundle.verify()
        return bundle
    key = cache_key(bundle, "weights")
    entry = cache.find(key)
    known = _unchanged(bundle, entry) if entry is not None else []
    bundle.verify(known)
    if entry is not None and len(known) < len(_weights(bundle)):  # a copy of the bundle, or one that was touched
        cache.update(key, {**entry.note, "bundle": str(bundle.path), "files": signature(_weights(bundle))})
    return bundle


def best_tuning(bundle: Bundle, threads: int | None, cache: BoardCache | None) -> Tuning:
    """Return how to set threads: as asked for, else as measured on this board, else as many as there are cores."""
    if threads is not None:
        return Tuning(threads)
    known = recall(cache, cache_key(bundle, "tuning")) if cache is not None else None
    return known or Tuning(default_threads())


def open_graph(
    bundle: Bundle, tuning: Tuning, cache: BoardCache | None = None, profile: Path | None = None
) -> ort.InferenceSession:
    """Load a bundle's graph, through the cache where there is one.

    With `profile` every run is profiled, into a file whose path begins so; `end_profiling` writes it and returns its
    name. Raises `BundleError` when onnxruntime refuses the graph or is older than the bundle needs, and `EdgelmError`
    when `threads` is out of range.
    """
    check_runtime(bundle.manifest.needs_onnxruntime, bundle.path)
    if tuning.threads > cores():
        LOG.warning("%d threads on %d cores: more threads than cores make it slower", tuning.threads, cores())
    if cache is not None and _is_worth_it(bundle):
        graph = _packed(bundle, tuning, cache, profile)
        if graph is not None:
            return graph
    return _checked(bundle, tuning, profile)


def check_runtime(oldest: str | None, what: object) -> None:
    """Raise `BundleError` where `what` needs a newer onnxruntime than this one; `oldest` is such as "1.28"."""
    if oldest is not None and tuple(map(int, oldest.split("."))) > RUNTIME:
        raise BundleError(
            f"{what} needs onnxruntime {oldest} or newer, this is {ort.__version__}: upgrade onnxruntime, or export"
            " with --kv fp32"
        )


def load_graph(
    model: str | bytes,
    threads: int,
    *,
    spin: bool = True,
    save_to: Path | None = None,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Load an ONNX model, from a file or from its bytes, on the CPU.

    `spin` lets idle threads wait actively: quicker for one graph, ruinous for several that take turns. `save_to` is a
    directory that gets the optimized graph with its packed weights, `profile` how a profile's path begins. Raises
    `EdgelmError` when `threads` is out of range, and whatever onnxruntime raises for the model.
    """
    options = _options(Tuning(threads, spin), profile)
    if save_to is not None:
        options.optimized_model_filepath = str(save_to / PACKED)
        for name, value in (
            ("session.save_external_prepacked_constant_initializers", "1"),
            ("session.optimized_model_external_initializers_file_name", f"{PACKED}.data"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", "64"),
        ):
            options.add_session_config_entry(name, value)
    if OLD_WINDOWS:
        content = model if isinstance(model, bytes) else Path(model).read_bytes()
        if has_windows(content):
            if isinstance(model, str):
                folder = "session.model_external_initializers_file_folder_path"
                options.add_session_config_entry(folder, str(Path(model).parent))
            model = with_old_windows(content)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _options(tuning: Tuning, profile: Path | None = None) -> ort.SessionOptions:
    if not 1 <= tuning.threads <= 256:
        raise EdgelmError(f"threads must lie in [1, 256], got {tuning.threads}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = tuning.threads
    if not tuning.spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def _checked(bundle: Bundle, tuning: Tuning, profile: Path | None) -> ort.InferenceSession:
    try:
        return load_graph(str(bundle.graph), tuning.threads, spin=tuning.spin, profile=profile)
    except EdgelmError:
        raise
    except Exception as error:  # onnxruntime raises types of its own, unrelated to each other
        raise BundleError(f"onnxruntime {ort.__version__} cannot load {bundle.graph}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first line of what an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- packed weights ---


def _is_worth_it(bundle: Bundle) -> bool:
    return bundle.bytes >= WORTH_BYTES and bundle.manifest.cache.kind == "shared"


def _packed(bundle: Bundle, tuning: Tuning, cache: BoardCache, profile: Path | None) -> ort.InferenceSession | None:
    """Load what was packed before, or pack it now; return None where the cache cannot keep it."""
    key = cache_key(bundle, "weights")
    entry = cache.find(key)
    if entry is not None and UNUSABLE not in entry.note:
        graph = _mapped(entry, tuning, profile)
        if graph is not None:
            return graph
        cache.drop(key)
        entry = None
    if entry is None:
        entry = cache.make(key, GROWTH * bundle.bytes, lambda folder: _pack(bundle, tuning, folder))
        if entry is not None and UNUSABLE in entry.note:
            LOG.warning("the weights of %s stay in private memory: %s", bundle.path, entry.note[UNUSABLE])
    return _mapped(entry, tuning, profile) if entry is not None and UNUSABLE not in entry.note else None


def _pack(bundle: Bundle, tuning: Tuning, folder: Path) -> Mapping[str, Any]:
    """Write a bundle's graph with packed weights into a folder; return the note that goes with them.

    A copy that does not compute what the original does, to the last bit, is removed, and the note says so: onnxruntime
    1.31 puts packed weights behind the original ones, where kernels that want them aligned to 64 bytes misread those
    behind a matrix of another size. Raises `OSError` where onnxruntime cannot write or read the copy.
    """
    started = time.perf_counter()
    try:
        expected = _probe(load_graph(str(bundle.graph), tuning.threads, save_to=folder))
        found = _probe(_load_packed(folder, tuning))  # the first one is gone: two would take twice the memory
    except Exception as error:  # a bundle that cannot be loaded will say so without a cache
        raise OSError(f"onnxruntime cannot keep packed weights: {_reason(error)}") from error
    note = {"bundle": str(bundle.path), "files": signature(_weights(bundle))}
    if not np.array_equal(expected, found):
        for file in folder.iterdir():
            file.unlink()
        return note | {UNUSABLE: f"onnxruntime {ort.__version__} does not read back what it packed"}
    seconds = time.perf_counter() - started
    LOG.info("packed the weights of %s for this board in %.1f s: %s", bundle.path, seconds, folder.parent)
    return note


def _mapped(entry: Entry, tuning: Tuning, profile: Path | None) -> ort.InferenceSession | None:
    try:
        return _load_packed(entry.path, tuning, profile)
    except Exception as error:  # noqa: BLE001  whatever onnxruntime dislikes about it: the bundle itself is there
        LOG.warning("%s in the board cache is not used: %s", entry.path, _reason(error))
        return None


def _load_packed(folder: Path, tuning: Tuning, profile: Path | None = None) -> ort.InferenceSession:
    """Load a graph that is optimized already."""
    options = _options(tuning, profile)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(folder / PACKED), options, providers=["CPUExecutionProvider"])


def _probe(graph: ort.InferenceSession) -> NDArray[np.float32]:
    """Compute the logits of token 0 alone, float32 [1, V]: every matrix takes part."""
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int8)": np.int8}
    feeds = {
        value.name: np.zeros([size if isinstance(size, int) else 1 for size in value.shape], types[value.type])
        for value in graph.get_inputs()
    }
    feeds["total_sequence_length"][:] = 1
    logits: NDArray[np.float32] = graph.run(["logits"], feeds)[0]
    return logits


def _weights(bundle: Bundle) -> dict[str, Path]:
    """Return the files that the packed graph stands for."""
    names = [name for name in bundle.manifest.files if name.startswith(bundle.manifest.graph)]
    return {name: bundle.path / name for name in names}


def _unchanged(bundle: Bundle, entry: Entry) -> list[str]:
    """Return the names of files that were verified when the entry was made and look the same now."""
    try:
        now = signature(_weights(bundle))
    except OSError:
        return []
    known = entry.note.get("files")
    return [name for name, seen in now.items() if isinstance(known, dict) and known.get(name) == seen]
