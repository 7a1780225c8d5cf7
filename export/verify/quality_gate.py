"""The quality gate: a new bundle beside the unquantized checkpoint it was made from, on the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.bundle_folder import Bundle
from edgelm.errors import EdgelmError
from edgelm.runtime.divergence import DivergenceMeter, DivergenceReport
from edgelm.runtime.runner import open_runner

from ..architectures.weights import DecoderWeights
from ..calibration.layers import ReferenceModel
from ..calibration.text_samples import Document, position_ranges
from ..progress_callback import ProgressCallback

Array = NDArray[np.float32]


class Predictor(Protocol):
    """Something that predicts documents."""

    def logits(self, documents: Sequence[Document]) -> Iterator[Array]:
        """Yield float32 [n, V] for pieces of `CHUNK_POSITIONS` positions, in the order of `position_ranges`."""


class CheckpointPredictor:
    """The unquantized checkpoint, through our own float32 graph, a layer at a time."""

    def __init__(self, weights: DecoderWeights, progress: ProgressCallback) -> None:
        self._weights = weights
        self._progress = progress

    def logits(self, documents: Sequence[Document]) -> Iterator[Array]:
        """See `Predictor`. All documents' hidden states are in memory, and the head's matrix."""
        layers = ReferenceModel(self._weights, max(len(document) for document in documents))
        hidden, count = layers.embed(documents), len(self._weights.decoder.layers)
        for i in range(count):
            self._progress("reference layers", i, count)
            hidden = layers.layer(i).step(hidden)
        head = layers.head().whole()
        for document, states in zip(documents, hidden, strict=True):
            for start, stop in position_ranges(document):
                yield layers.logits(layers.final(states[start:stop]), head)


class BundlePredictor:
    """Another bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def logits(self, documents: Sequence[Document]) -> Iterator[Array]:
        """See `Predictor`."""
        session = open_runner(self._bundle, rows=1, context=max(len(document) for document in documents))
        for document in documents:
            for start, stop in position_ranges(document):
                yield session.prefill(0, document[start:stop], start, all_logits=True, final_length=len(document))


def measure_agreement(
    bundle: Bundle,
    reference: Predictor,
    documents: Sequence[Document],
    progress: ProgressCallback,
    what: str = "verify",
) -> DivergenceReport:
    """Compare a bundle with its reference at every position that has a next token; `what` is told of the progress.

    Raises `EdgelmError` when the two do not have the same vocabulary.
    """
    divergence = DivergenceMeter()
    expected, found = reference.logits(documents), BundlePredictor(bundle).logits(documents)
    for number, document in enumerate(documents):
        for start, stop in position_ranges(document):
            first, second = next(expected), next(found)
            if first.shape != second.shape:
                raise EdgelmError(
                    f"the bundle has a vocabulary of {second.shape[1]}, its reference one of {first.shape[1]}:"
                    " they do not belong together"
                )
            divergence.add(first, second, document[start + 1 : stop + 1])
        progress(f"{what}: document", number + 1, len(documents))
    return divergence.result()


def check_agreement(agreement: DivergenceReport, max_kl: float | None, min_agreement: float | None) -> None:
    """Raise `EdgelmError` when a bundle is further from its checkpoint than asked for."""
    if max_kl is not None and agreement.kl_mean > max_kl:
        raise EdgelmError(
            f"the bundle's mean KL divergence is {agreement.kl_mean:.4f}, --max-kl allows {max_kl}: calibrate with"
            " --method gptq, take a smaller --block-size or more bits"
        )
    if min_agreement is not None and agreement.top1_agreement < min_agreement:
        raise EdgelmError(
            f"the bundle and its checkpoint agree on {agreement.top1_agreement:.4f} of the likeliest tokens,"
            f" --min-agreement asks for {min_agreement}: calibrate with --method gptq, take a smaller --block-size or"
            " more bits"
        )


def quality_facts(agreement: DivergenceReport, name: str, left_out: int = 0) -> dict[str, Any]:
    """Return what goes into the manifest; `name` is the text's file name, of which `left_out` tokens were left out."""
    return {
        "text": name,
        "tokens": agreement.tokens,
        "perplexity": round(agreement.perplexity, 6),
        "reference_perplexity": round(agreement.reference_perplexity, 6),
        "kl_mean": round(agreement.kl_mean, 8),
        "kl_p99": round(agreement.kl_p99, 8),
        "top1_agreement": round(agreement.top1_agreement, 6),
        **({"left_out_tokens": left_out} if left_out else {}),
    }
