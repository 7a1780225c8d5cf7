"""The self-check of a quantized export: compares the bundle with the unquantized model on a few hundred tokens.

It takes seconds and needs no text from the user. It shows whether the bundle works at all; `quality_gate` measures how
good it is.
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
"""Five short texts of different kinds, part of the package."""

CHECKED_TOKENS: Final = 128
"""Tokens of each text that are compared."""

MAX_KL: Final = 1.0
"""Mean KL divergence in nats above which a bundle counts as broken. int4 without calibration stays below 0.5."""

MAX_PERPLEXITY_RATIO: Final = 3.0
"""Ratio to the unquantized model's perplexity above which a bundle counts as broken."""


class SelfCheckError(EdgelmError):
    """A new bundle predicts so much worse than its checkpoint that it is unusable."""


def self_check(
    bundle: Bundle, reference: Predictor, tokenizer: Tokenizer, progress: ProgressCallback
) -> dict[str, Any]:
    """Return the quality facts of a bundle on the sample text; keys as in `quality_facts`.

    Raises `EdgelmError` if the logits are not finite. `raise_if_broken` checks the limits.
    """
    documents = sample_documents(bundle, tokenizer)
    return quality_facts(measure_agreement(bundle, reference, documents, progress, "self-check"), SAMPLE_FILE.name)


def sample_documents(bundle: Bundle, tokenizer: Tokenizer) -> list[Document]:
    """Return the sample texts as token ids, cut at `CHECKED_TOKENS` or the bundle's context."""
    manifest = bundle.manifest
    length = min(CHECKED_TOKENS, manifest.context)
    return document_starts(SAMPLE_FILE.read_text(encoding="utf-8"), tokenizer, manifest.bos_token, length)


def raise_if_broken(found: Mapping[str, Any]) -> None:
    """Raise `SelfCheckError` if the figures exceed `MAX_KL` or `MAX_PERPLEXITY_RATIO`."""
    ratio = found["perplexity"] / found["reference_perplexity"]
    if found["kl_mean"] <= MAX_KL and ratio <= MAX_PERPLEXITY_RATIO:
        return
    raise SelfCheckError(
        f"the self-check failed: on {found['tokens']} tokens of sample text the bundle's perplexity is"
        f" {found['perplexity']:.4g}, the unquantized model's {found['reference_perplexity']:.4g}, the mean KL"
        f" divergence {found['kl_mean']:.3g} nats; the limits are {MAX_PERPLEXITY_RATIO:g} times the perplexity and"
        f" {MAX_KL:g}."
        " Use more bits (--quant int8, --quant mixed) or other calibration text; --force writes the bundle anyway"
    )
