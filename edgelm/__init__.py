"""edgelm: small language models on a board.

>>> import edgelm
>>> with edgelm.load("builtin") as lm:
...     print(lm.generate("play some jazz by Miles Davis on spotify").text)

Importing this package loads neither onnxruntime, numba nor paho: names are imported when first used (PEP 562).
It disables the telemetry of onnxruntime and of Hugging Face's libraries, unless their environment variables are set.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from edgelm._version import __version__

if TYPE_CHECKING:
    from edgelm.bundle.bundle_folder import Bundle, open_bundle
    from edgelm.bundle.manifest import Manifest
    from edgelm.errors import BundleError, CheckpointError, ConfigError, EdgelmError, RequestError
    from edgelm.model import Model, load
    from edgelm.types import Chunk, Completion, Request, SamplingParams, Timing, Usage

__all__ = [
    "Bundle",
    "BundleError",
    "CheckpointError",
    "Chunk",
    "Completion",
    "ConfigError",
    "EdgelmError",
    "Manifest",
    "Model",
    "Request",
    "RequestError",
    "SamplingParams",
    "Timing",
    "Usage",
    "__version__",
    "load",
    "open_bundle",
]

for _variable in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):  # read when the libraries are imported
    os.environ.setdefault(_variable, "1")

_MODULES = {
    **dict.fromkeys(("Bundle", "open_bundle"), "bundle.bundle_folder"),
    "Manifest": "bundle.manifest",
    **dict.fromkeys(("BundleError", "CheckpointError", "ConfigError", "EdgelmError", "RequestError"), "errors"),
    **dict.fromkeys(("Chunk", "Completion", "Request", "SamplingParams", "Timing", "Usage"), "types"),
    **dict.fromkeys(("Model", "load"), "model"),
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'edgelm' has no attribute {name!r}")
    return getattr(import_module(f"edgelm.{_MODULES[name]}"), name)
