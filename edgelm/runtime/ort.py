"""Loads graphs into onnxruntime: thread settings, adaptation to its version, graphs with packed weights.

Knows nothing of rows or requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, TypeAlias

import onnxruntime as ort

from edgelm.bundle.bundle_folder import Bundle
from edgelm.errors import BundleError, EdgelmError
from edgelm.graph.domain import BATCH_INVARIANT_KEY
from edgelm.graph.onnx_model import add_metadata, change_attribute
from edgelm.kernels.abi import KERNELS_VERSION
from edgelm.kernels.custom_ops import CustomOpLibrary
from edgelm.kernels.rewrite.code_expansion import expand_codes
from edgelm.runtime.sliding_window import has_windows, shrink_sliding_windows
from edgelm.runtime.threads import THREADS_LIMIT, ThreadSettings, default_threads, load_tuning
from edgelm.system.board_cache import BoardCache, CacheKey, describe_cpu

Graph: TypeAlias = ort.InferenceSession
"""A loaded graph."""

ORT_VERSION: Final[str] = ort.__version__
"""Version of the installed onnxruntime."""

ORT_RELEASE: Final = tuple(map(int, ort.__version__.split(".")[:2]))
"""Major and minor version of the installed onnxruntime."""

WINDOW_IS_OFF_BY_ONE: Final = ORT_RELEASE < (1, 24)
"""Whether the installed onnxruntime attends to one position more than `local_window_size`."""

PACKED_GRAPH_FILE: Final = "model.onnx"
"""File name of a graph with packed weights."""

_FLOAT_ACTIVATIONS: Final = 1
"""Accuracy level at which MatMulNBits does not quantize activations."""


def cache_key(bundle: Bundle, kind: str) -> CacheKey:
    """Return the key of an entry that depends on a bundle's weights, onnxruntime, our kernels and this processor."""
    return CacheKey(
        kind, bundle.manifest.weights_digest, f"{ort.__version__}, kernels {KERNELS_VERSION}", describe_cpu()
    )


def resolve_thread_settings(bundle: Bundle, threads: int | None, cache: BoardCache | None) -> ThreadSettings:
    """Return the thread settings: the given number, else the settings tuned on this board, else the default."""
    if threads is not None:
        return ThreadSettings(threads)
    known = load_tuning(cache, cache_key(bundle, "tuning")) if cache is not None else None
    return known or ThreadSettings(default_threads())


def check_ort_version(oldest: str | None, what: object) -> None:
    """Raise `BundleError` if `what` needs a newer onnxruntime than the installed one; `oldest` is like "1.28"."""
    if oldest is not None and tuple(map(int, oldest.split("."))) > ORT_RELEASE:
        raise BundleError(
            f"{what} needs onnxruntime {oldest} or newer, installed is {ort.__version__}: upgrade onnxruntime, or"
            " export with --kv fp32"
        )


def load_graph(
    model: str | bytes,
    threads: int,
    *,
    spin: bool = True,
    exact: bool = False,
    save_to: Path | None = None,
    profile_prefix: Path | None = None,
) -> Graph:
    """Load an ONNX model, from a file or from its bytes, on the CPU.

    With `spin`, idle threads spin instead of sleeping: faster for one graph, very slow for several that run in turn.
    With `exact`, activations are not quantized to 8 bits. The optimized graph with its packed weights is written to the
    directory `save_to`. `profile_prefix` is the beginning of the profile's path. Raises `EdgelmError` if `threads` is
    out of range, and any exception that onnxruntime raises for the model.
    """
    options = _options(ThreadSettings(threads, spin), profile_prefix)
    if save_to is not None:
        options.optimized_model_filepath = str(save_to / PACKED_GRAPH_FILE)
        for name, value in (
            ("session.save_external_prepacked_constant_initializers", "1"),
            ("session.optimized_model_external_initializers_file_name", f"{PACKED_GRAPH_FILE}.data"),
            ("session.optimized_model_external_initializers_min_size_in_bytes", "64"),
        ):
            options.add_session_config_entry(name, value)
    values: list[ort.OrtValue] = []
    expanded = None
    if isinstance(model, str):
        file = Path(model)
        expanded = expand_codes(file.read_bytes(), file.with_name(f"{file.name}.data"))
        if expanded is not None or exact or WINDOW_IS_OFF_BY_ONE:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
            model = file.read_bytes() if expanded is None else expanded.model
    if expanded is not None:
        values = [ort.OrtValue.ortvalue_from_numpy(codes) for codes in expanded.codes.values()]
        options.add_external_initializers(list(expanded.codes), values)
    if isinstance(model, bytes):
        model = adapt_to_ort_version(model)
        if exact:
            model = change_attribute(model, "accuracy_level", lambda _: _FLOAT_ACTIVATIONS)
    graph = Graph(model, options, providers=["CPUExecutionProvider"])
    graph.expanded_codes = values  # the graph uses their memory
    return graph


def adapt_to_ort_version(model: bytes) -> bytes:
    """Return a model that computes with the installed onnxruntime what the given one computes with newer ones."""
    return shrink_sliding_windows(model) if WINDOW_IS_OFF_BY_ONE and has_windows(model) else model


def summarize_error(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_invariant(graph: Graph) -> bool:
    """Return whether a graph was marked by `mark_invariant`."""
    return bool(graph.get_modelmeta().custom_metadata_map.get(BATCH_INVARIANT_KEY) == "1")


def mark_invariant(model: bytes) -> bytes:
    """Return a model, an ONNX ModelProto, with metadata that marks it as batch-invariant."""
    return add_metadata(model, BATCH_INVARIANT_KEY, "1")


def load_packed(
    folder: Path, tuning: ThreadSettings, operators: CustomOpLibrary | None = None, profile_prefix: Path | None = None
) -> Graph:
    """Load an optimized graph with packed weights, with `operators` if it was rewritten for our kernels.

    Raises any exception that onnxruntime raises for it.
    """
    options = _options(tuning, profile_prefix)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if operators is not None:
        operators.register(options)
    return Graph(str(folder / PACKED_GRAPH_FILE), options, providers=["CPUExecutionProvider"])


def _options(tuning: ThreadSettings, profile_prefix: Path | None = None) -> ort.SessionOptions:
    if not 1 <= tuning.threads <= THREADS_LIMIT:
        raise EdgelmError(f"threads must lie in [1, {THREADS_LIMIT}], got {tuning.threads}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = tuning.threads
    if not tuning.spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # onnxruntime raises its errors as well
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    return options
