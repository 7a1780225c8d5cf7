"""From a Hugging Face checkpoint to a bundle: `edgelm_export.export(...)`."""

import edgelm  # noqa: F401  before onnxruntime: it switches telemetry off

from .pipeline import export, outline
from .reference.compare import compare

__all__ = ["compare", "export", "outline"]
