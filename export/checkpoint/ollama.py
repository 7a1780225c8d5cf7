"""Opens a model of a local Ollama store. Manifests name blobs, files named by their SHA-256; one is the GGUF file.

The layout is that of Ollama 0.1 to 0.12: `manifests/HOST/NAMESPACE/MODEL/TAG` and `blobs/sha256-HEX`, in the folder
OLLAMA_MODELS, otherwise ~/.ollama/models or the service's folder. Nothing is downloaded and no server is contacted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from edgelm.errors import CheckpointError

from .checkpoint import Checkpoint
from .gguf import open_gguf
from .reading import read_json

OLLAMA_SCHEME: Final = "ollama:"
SERVICE: Final = Path("/usr/share/ollama/.ollama/models")
"""The folder of the service of a Linux installation."""

NAME: Final = re.compile(
    r"(?:(?:(?P<host>[A-Za-z0-9][\w.-]{,200}(?::[0-9]{1,5})?)/)?(?P<namespace>[A-Za-z0-9][\w.-]{,79})/)?"
    r"(?P<model>[A-Za-z0-9][\w.-]{,79})(?::(?P<tag>[A-Za-z0-9][\w.-]{,79}))?",
    re.ASCII,
)
"""No part can be `..` or contain a slash, so no name leads out of the store."""

DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
MEDIA_TYPE_PREFIX: Final = "application/vnd.ollama.image."
MAX_JSON: Final = 1 << 20
MAX_LISTED: Final = 20
"""Maximum number of models that an error lists."""

TEMPERATURE: Final = 0.8
"""Ollama's default, for a model with sampling parameters but without this one."""

PARAMETERS: Final = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "num_predict": "max_new_tokens",
    "stop": "stop_strings",
}
"""Ollama's parameters, and the equivalent fields of generation_config.json; others are ignored."""


def open_ollama(source: str) -> Checkpoint:
    """Open `ollama:[[HOST/]NAMESPACE/]MODEL[:TAG]`; the default tag is `latest`.

    The chat template is that of the GGUF file, because Ollama's is not Jinja. Raises `CheckpointError` for an invalid
    name, a missing model (with those present), and a damaged store.
    """
    found = NAME.fullmatch(source.removeprefix(OLLAMA_SCHEME))
    if found is None:
        raise CheckpointError(f"{source[:200]!r} is not a model name; expected ollama:NAME or ollama:NAME:TAG")
    parts = [
        found["host"] or "registry.ollama.ai",
        found["namespace"] or "library",
        found["model"],
        found["tag"] or "latest",
    ]
    roots = _roots()
    root = next((root for root in roots if root.joinpath("manifests", *parts).is_file()), None)
    if root is None:
        raise CheckpointError(f"{source} is not in {' or '.join(map(str, roots))}; {_listing(roots)}")
    manifest = root.joinpath("manifests", *parts)
    layers = _layers(manifest)
    model = [layer for layer in layers if layer.get("mediaType") == MEDIA_TYPE_PREFIX + "model"]
    if len(model) != 1 or any(layer.get("mediaType") == MEDIA_TYPE_PREFIX + "adapter" for layer in layers):
        raise CheckpointError(
            f"{source} is not one GGUF file: models with several files or an adapter are not supported"
        )
    parameters = [layer for layer in layers if layer.get("mediaType") == MEDIA_TYPE_PREFIX + "params"]
    defaults = _generation(_object(_blob(root, manifest, parameters[0]))) if parameters else {}
    return open_gguf(_blob(root, manifest, model[0]), defaults)


def _roots() -> list[Path]:
    """Return the folders that may hold a store, in the order of search."""
    given = os.environ.get("OLLAMA_MODELS")
    if given:
        return [Path(given)]
    try:
        return [Path.home() / ".ollama" / "models", SERVICE]
    except RuntimeError:  # a user without a home
        return [SERVICE]


def _listing(roots: list[Path]) -> str:
    names = sorted({name for root in roots for name in _models(root)})
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"there are {', '.join(names[:MAX_LISTED])}{more}" if names else "no models found"


def _models(root: Path) -> Iterator[str]:
    """Yield the shortest names of all models of a store."""
    try:
        for file in root.glob("manifests/*/*/*/*"):
            host, namespace, model, tag = file.parts[-4:]
            shown = [part for part in (host, namespace) if part not in ("registry.ollama.ai", "library")]
            yield "/".join([*([host, namespace] if host in shown else shown), f"{model}:{tag}"])
    except OSError:  # the store of another user, without read permission
        return


def _layers(manifest: Path) -> list[Mapping[str, Any]]:
    layers = _object(manifest).get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise CheckpointError(f"{manifest} is damaged: it has no list of layers")
    return layers


def _object(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{file} is damaged: it has more than {MAX_JSON} bytes")
    return read_json(file)


def _blob(root: Path, manifest: Path, layer: Mapping[str, Any]) -> Path:
    """Return the file of a layer. Its name and size are checked against the manifest; its content is not hashed."""
    digest = DIGEST.fullmatch(str(layer.get("digest")))
    if digest is None:
        raise CheckpointError(f"{manifest} is damaged: {str(layer.get('digest'))[:80]!r} is not a SHA-256 digest")
    file = root / "blobs" / f"sha256-{digest[1]}"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing but listed in {manifest}: `ollama pull` the model again")
    size = file.stat().st_size
    if size != layer.get("size"):
        raise CheckpointError(f"{file} has {size} bytes, {manifest} says {layer.get('size')}: it is damaged")
    return file


def _generation(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's parameters as fields of generation_config.json. Their values are checked where they are used."""
    found = {ours: parameters[theirs] for theirs, ours in PARAMETERS.items() if parameters.get(theirs) is not None}
    if found.get("max_new_tokens") in (-1, -2):  # no limit, or until the context is full
        del found["max_new_tokens"]
    stops = found.get("stop_strings", [])
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise CheckpointError(f"the model's parameter stop must be a list of strings, got {str(stops)[:80]}")
    if found.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        found.setdefault("temperature", TEMPERATURE)
        found["do_sample"] = found["temperature"] != 0
    return found
