"""The self-check of a quantized export: the new bundle beside the unquantized model, on some hundred tokens.

It takes seconds and needs no text of the user's, and says whether the bundle works at all. `verify` measures how good
it is on a text of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from edgelm.bundle.bundle_folder import Bundle
from edgelm.errors import EdgelmError
from edgelm.text.tokenizer import Tokenizer

from ..calibration.text_samples import Document, document_starts
from ..progress_callback import ProgressCallback
from .quality_gate import Predictor, measure_agreement, quality_facts

SAMPLE_FILE: Final = Path(__file__).with_name("sample.txt")
"""Five short texts of different kinds that come with the program."""

CHECKED_TOKENS: Final = 128
"""Tokens of each text that are looked at."""

MAX_KL: Final = 1.0
"""Mean KL divergence in nats from which on a bundle counts as broken. int4 without calibration stays below 0.5."""

MAX_PERPLEXITY_RATIO: Final = 3.0
"""Perplexity beside the unquantized model's from which on a bundle counts as broken."""


class SelfCheckError(EdgelmError):
    """A new bundle predicts so much worse than the model it was made from that it is of no use."""


def self_check(
    bundle: Bundle, reference: Predictor, tokenizer: Tokenizer, progress: ProgressCallback
) -> dict[str, Any]:
    """Return what a bundle loses on the sample text beside its reference; keys as in `Manifest.quality_facts`.

    Raises `EdgelmError` where the bundle's logits are not numbers; see `raise_if_broken` for bounds.
    """
    documents = sample_documents(bundle, tokenizer)
    return quality_facts(measure_agreement(bundle, reference, documents, progress, "self-check"), SAMPLE_FILE.name)


def sample_documents(bundle: Bundle, tokenizer: Tokenizer) -> list[Document]:
    """Return the sample text as token ids, a document each, cut at `CHECKED_TOKENS` or the bundle's context."""
    manifest = bundle.manifest
    length = min(CHECKED_TOKENS, manifest.context)
    return document_starts(SAMPLE_FILE.read_text(encoding="utf-8"), tokenizer, manifest.bos_token, length)


def raise_if_broken(found: Mapping[str, Any]) -> None:
    """Raise `SelfCheckError` for a self-check whose figures exceed `MAX_KL` or `MAX_PERPLEXITY_RATIO`."""
    ratio = found["perplexity"] / found["reference_perplexity"]
    if found["kl_mean"] <= MAX_KL and ratio <= MAX_PERPLEXITY_RATIO:
        return
    raise SelfCheckError(
        f"the self-check failed: on {found['tokens']} tokens of sample text the bundle's perplexity is"
        f" {found['perplexity']:.4g} where the unquantized model's is {found['reference_perplexity']:.4g}, mean KL"
        f" divergence {found['kl_mean']:.3g} nats; allowed are {MAX_PERPLEXITY_RATIO:g} times as much and {MAX_KL:g}."
        " Take more bits (--quant int8, --quant mixed) or other calibration text; --force writes the bundle as it is"
    )
