"""Model families: how each one's configuration and weight names map onto the decoder. One file a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from edgelm.errors import CheckpointError

from ..decoder import Decoder, Names
from . import llama


class Family(NamedTuple):
    """One model family: reads a config.json, and says where the checkpoint keeps each tensor."""

    decoder: Callable[[Mapping[str, Any]], Decoder]
    names: Names


FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(llama.decoder, llama.NAMES),
}
"""By `model_type` of config.json."""


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json. Raises `CheckpointError` naming the model type and the supported ones."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"architecture {model_type!r} has no builder here; supported: {', '.join(sorted(FAMILIES))}."
            " Others can be tried with --via optimum"
        )
    return FAMILIES[model_type]
