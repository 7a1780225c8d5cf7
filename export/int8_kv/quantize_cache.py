"""The key/value memory of a written bundle, turned into int8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from edgelm.bundle.manifest import Bundle, Manifest

from ..calibration.text_samples import Document
from ..progress_callback import Progress
from ..source_model import Opened
from .int8_cache_graph import OLDEST_RUNTIME, with_int8_cache
from .ranges import measure_scales


def quantize_cache(
    folder: Path, manifest: Manifest, model: Opened, documents: Sequence[Document] | None, progress: Progress
) -> Manifest:
    """Change the graph of an unsealed bundle, whose cache is float32, to one in int8; return its manifest.

    Scales are those of what the bundle itself keeps of the documents, or of self-generated text where there are none.
    """
    scales = measure_scales(Bundle(folder, manifest), model, documents, progress)
    file = folder / manifest.graph
    graph = with_int8_cache(onnx.load(file, load_external_data=False), scales)
    file.write_bytes(graph.SerializeToString(deterministic=True))
    return replace(manifest, cache=replace(manifest.cache, bits=8), needs_onnxruntime=OLDEST_RUNTIME)
