"""From a Hugging Face checkpoint to a bundle: `edgelm_export.export(...)`."""

import edgelm  # noqa: F401 before onnxruntime: it switches telemetry off

from .compare import compare
from .pipeline import export, outline

__all__ = ["compare", "export", "outline"]
