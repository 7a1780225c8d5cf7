"""From a Hugging Face checkpoint to a bundle: `edgelm_export.export(...)`."""

from .pipeline import export, outline

__all__ = ["export", "outline"]
