"""Converts the KV cache of a written bundle to int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from edgelm.bundle.bundle_folder import Bundle
from edgelm.bundle.manifest import Manifest

from ..calibration.text_samples import Document
from ..progress_callback import ProgressCallback
from ..source_model import SourceModel
from .int8_cache_graph import MIN_ONNXRUNTIME, convert_cache_to_int8
from .ranges import measure_cache_scales


def quantize_kv_cache(
    folder: Path,
    manifest: Manifest,
    model: SourceModel,
    documents: Sequence[Document] | None,
    progress: ProgressCallback,
) -> Manifest:
    """Convert the graph of a bundle with a float32 KV cache; return the new manifest, not written yet.

    Scales come from the keys and values that the bundle computes for the documents, or for self-generated text if
    `documents` is None.
    """
    scales = measure_cache_scales(Bundle(folder, manifest), model, documents, progress)
    file = folder / manifest.graph
    graph = convert_cache_to_int8(onnx.load(file, load_external_data=False), scales)
    file.write_bytes(graph.SerializeToString(deterministic=True))
    return replace(manifest, cache=replace(manifest.cache, bits=8), needs_onnxruntime=MIN_ONNXRUNTIME)
