"""Optional requirements of tests: the export extra, and data outside the repository."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
EXPORT_MODULES = ("onnx", "safetensors", "ml_dtypes", "gguf")


def can_export() -> bool:
    """Whether the export extra is installed."""
    return all(importlib.util.find_spec(name) for name in EXPORT_MODULES)


def shared_folder() -> Path | None:
    """Return the folder of data and models outside the repository, or None."""
    path = Path(os.environ.get("EDGELM_SHARED") or REPO.parent / "shared")
    return path if (path / "models").is_dir() else None
