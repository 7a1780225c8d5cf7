"""From a Hugging Face checkpoint to a bundle: `edgelm_export.export(...)`."""

from edgelm_export.pipeline import export

__all__ = ["export"]
