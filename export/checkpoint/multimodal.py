"""Extracts the text model of a multimodal checkpoint: its configuration and tensors as those of a text-only model.

A text position is the same in all dimensions, so rotary embeddings with sections for time, height and width (Qwen2-VL,
arXiv:2409.12191, section 2.1) equal the plain ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError

from .checkpoint import CheckpointTensors

TEXT_TYPES: Final = {
    "gemma3": "gemma3_text",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "qwen2_5_vl": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "smolvlm": "llama",
}
"""Multimodal model types, and their text model's type if text_config has none."""

MODEL_TYPE_ALIASES: Final = {"qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Model types of text models, and the architecture that computes the same on text."""

DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "mistral": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
"""Sizes that a text_config omits if they are the defaults of transformers' configuration class."""

SHARED_KEYS: Final = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
"""Options that the whole model's configuration may hold instead of text_config."""

BODIES: Final = ("language_model.model.", "model.language_model.", "language_model.", "model.text_model.", "model.")
HEADS: Final = ("language_model.lm_head.", "lm_head.", "model.lm_head.")
"""Prefixes of the layers and the head in transformers 4 before and after 4.52."""


class TextModel(NamedTuple):
    """Configuration and tensors of a text model, and a note for the user on the parts left out."""

    config: Mapping[str, Any]
    tensors: CheckpointTensors
    note: str | None = None


def extract_text_model(tensors: CheckpointTensors, config: Mapping[str, Any]) -> TextModel:
    """Return the text model of a multimodal checkpoint; a text-only checkpoint unchanged.

    quantization_config is removed from the configuration: the tensors are already dequantized. Raises `CheckpointError`
    if the text model is not found.
    """
    whole = {name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in TEXT_TYPES:
        return TextModel(whole, tensors)
    given = config.get("text_config")
    if given is None:
        given = (
            whole if "hidden_size" in config else {}
        )  # Qwen2-VL's first form: the text model's sizes are at the top level
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: text_config must be an object, got {str(given)[:80]!r}")
    text_type = given.get("model_type") or TEXT_TYPES[kind]
    if text_type == kind:
        text_type = TEXT_TYPES[kind]
    text_type = MODEL_TYPE_ALIASES.get(text_type, text_type) if isinstance(text_type, str) else text_type
    shared = {name: config[name] for name in SHARED_KEYS if name in config}
    present = {name: value for name, value in given.items() if name != "quantization_config"}
    text = {**DEFAULTS.get(str(text_type), {}), **shared, **present, "model_type": text_type}
    for name in SHARED_KEYS:
        if text.get(name) is None and config.get(name) is not None:
            text[name] = config[name]
    body = _prefix(tensors.names, BODIES, "embed_tokens.weight")
    if body is None:
        raise CheckpointError(
            f"this {kind} checkpoint has no tensor *embed_tokens.weight under {', '.join(BODIES)}: its text model"
            " is not found"
        )
    head = _prefix(tensors.names, HEADS, "weight")
    if head is None:
        text["tie_word_embeddings"] = True
    note = f"a {kind} checkpoint: only its text model ({text_type}) is exported, without images or sound"
    return TextModel(text, RenamedTensors(tensors, {"model.": body, "lm_head.": head or "lm_head."}), note)


@dataclass(frozen=True, slots=True)
class RenamedTensors:
    """Tensors with other name prefixes. `prefixes`: new prefix -> the checkpoint's prefix."""

    tensors: CheckpointTensors
    prefixes: Mapping[str, str]

    @property
    def names(self) -> Collection[str]:
        """Names of the text model's tensors."""
        return {
            plain + name.removeprefix(stored)
            for plain, stored in self.prefixes.items()
            for name in self.tensors.names
            if name.startswith(stored)
        }

    def tensor(self, name: str, shape: tuple[int, ...], rows: slice | None = None) -> NDArray[np.float32]:
        """See `CheckpointTensors.tensor`."""
        for plain, stored in self.prefixes.items():
            if name.startswith(plain):
                return self.tensors.tensor(stored + name.removeprefix(plain), shape, rows)
        return self.tensors.tensor(name, shape, rows)


def _prefix(names: Collection[str], prefixes: tuple[str, ...], end: str) -> str | None:
    return next((prefix for prefix in prefixes if prefix + end in names), None)
