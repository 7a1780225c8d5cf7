"""From a Hugging Face checkpoint to a bundle: `edgelm_export.export(...)`."""

from .compare import compare
from .pipeline import export, outline

__all__ = ["compare", "export", "outline"]
