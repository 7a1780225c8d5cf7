"""Opens a checkpoint with transformers without running code from it: plain configuration, safetensors, no network.

`trust_remote_code=False` is not enough. Up to transformers 5.2, a configuration's `_attn_implementation_internal` can
name a repository whose code is loaded anyway (CVE-2026-4372), and an adapter's configuration can name another model to
load. So the configuration is read here, and fields that can name code are removed before transformers reads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from edgelm.errors import CheckpointError

from .huggingface import tensor_files
from .reading import read_json

SAFE_LOAD_OPTIONS: Final = {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True}
"""Options of every `from_pretrained` of a model, together with a configuration of `read_safe_config`."""

CODE_FIELDS: Final = {
    "attn_implementation",
    "auto_map",
    "custom_generate",
    "custom_pipelines",
    "experts_implementation",
    "kernel_config",
    "name_or_path",
    "transformers_weights",
    "use_kernels",
}
"""Fields that can name code or files outside the directory. So can fields that begin with an underscore."""
ALLOWED_PRIVATE_FIELDS: Final = {"_sliding_window_pattern"}
"""The only field with an underscore that belongs to a model (Gemma 3)."""


def read_safe_config(transformers: Any, directory: Path) -> Any:
    """Return a configuration as transformers' class for its `model_type`, without fields that can name code.

    Raises `CheckpointError` for a directory without a configuration, a type that transformers does not have, an
    adapter, and weights that are not safetensors.
    """
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(f"{directory} has an adapter_config.json: merge the adapter into its model first")
    tensor_files(directory)  # checks that all weights are safetensors
    fields = read_json(directory / "config.json")
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        own = "; code in a checkpoint is never run" if "auto_map" in fields else ""
        raise CheckpointError(
            f"{directory / 'config.json'}: model_type {kind!r:.80} is not one of transformers"
            f" {transformers.__version__}{own}"
        )
    try:
        return transformers.CONFIG_MAPPING[kind].from_dict(_without_code(fields))
    except Exception as error:  # each class checks its fields differently
        raise CheckpointError(f"{directory / 'config.json'} cannot be read: {error!s:.300}") from error


def _without_code(value: Any) -> Any:
    """Return a JSON value without fields that can name code, recursively."""
    if isinstance(value, list):
        return [_without_code(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_code(inner)
        for name, inner in value.items()
        if name not in CODE_FIELDS and (not name.startswith("_") or name in ALLOWED_PRIVATE_FIELDS)
    }
