"""Compares a bundle with its checkpoint: `edgelm eval --reference`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle.bundle_folder import Bundle, open_bundle
from edgelm.bundle.manifest import MANIFEST
from edgelm.errors import BundleError, EdgelmError
from edgelm.text.documents import read_text
from edgelm.text.tokenizer import Tokenizer

from .calibration.text_samples import evaluation_documents
from .progress_callback import ProgressCallback, ignore_progress
from .source_model import VOCABULARY, open_source_model, with_vocabulary
from .verify.quality_gate import BundlePredictor, CheckpointPredictor, measure_agreement, quality_facts


def compare(
    bundle: str | Path,
    checkpoint: str | Path,
    text: str | Path,
    *,
    adapter: str | Path | None = None,
    context: int | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Measure a bundle against an unquantized checkpoint, merged with `adapter` if one is given.

    `text` is a file of documents. They are cut into sequences of at most 1,024 tokens and `context` (default: the
    bundle's). Of more than 65,536 tokens, as many are chosen at even distances, and `left_out_tokens` counts the rest.
    Returns the quality entry of a manifest: text, tokens, perplexity, reference_perplexity, kl_mean and kl_p99 in nats,
    top1_agreement in [0, 1]. Raises `EdgelmError` if bundle and checkpoint do not belong together or a file cannot be
    read.
    """
    opened = open_bundle(bundle)
    manifest, on_progress = opened.manifest, progress or ignore_progress
    if manifest.adapter is not None and adapter is None:
        raise EdgelmError(f"{opened.path} has the adapter {manifest.adapter} merged: pass it with --adapter")
    length = manifest.context if context is None else context
    measured = evaluation_documents(
        read_text(text, "--text"), Tokenizer.from_file(opened.tokenizer), manifest.bos_token, length
    )
    if manifest.via == "optimum":
        from .optimum.via_optimum import reference_bundle  # heavy: torch, transformers

        with (
            tempfile.TemporaryDirectory() as folder,
            reference_bundle(checkpoint, Path(folder), length, on_progress) as other,
        ):
            found = measure_agreement(opened, BundlePredictor(other), measured.documents, on_progress)
            return quality_facts(found, Path(text).name, measured.left_out_tokens)
    model = open_source_model(checkpoint, adapter)
    if manifest.vocabulary is not None:
        model = with_vocabulary(model, _kept(opened))
    if model.decoder.vocab_size != manifest.vocab_size:
        raise EdgelmError(
            f"{opened.path} has a vocabulary of {manifest.vocab_size}, {checkpoint} of {model.decoder.vocab_size}:"
            " they do not belong together"
        )
    found = measure_agreement(opened, CheckpointPredictor(model.weights, on_progress), measured.documents, on_progress)
    return quality_facts(found, Path(text).name, measured.left_out_tokens)


def _kept(bundle: Bundle) -> np.ndarray[Any, np.dtype[np.int64]]:
    file = bundle.path / VOCABULARY
    if VOCABULARY not in bundle.manifest.files:
        raise BundleError(f"{bundle.path / MANIFEST} does not list {VOCABULARY}: export the bundle again")
    try:
        return np.array(json.loads(file.read_text(encoding="utf-8")), np.int64)
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from error
