"""From a Hugging Face checkpoint to a bundle: `edgelm_export.export(...)`."""

from .pipeline import export, outline
from .reference.compare import compare

__all__ = ["compare", "export", "outline"]
