"""The quality gate: compares a new bundle with its unquantized checkpoint on the same text."""

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
    """A source of logits for documents."""

    def logits(self, documents: Sequence[Document]) -> Iterator[Array]:
        """Yield float32 [n, V] for each range of `position_ranges`, in order."""


class CheckpointPredictor:
    """The unquantized checkpoint, run by our own float32 graph, one layer at a time."""

    def __init__(self, weights: DecoderWeights, progress: ProgressCallback) -> None:
        self._weights = weights
        self._progress = progress

    def logits(self, documents: Sequence[Document]) -> Iterator[Array]:
        """See `Predictor`. The hidden states of all documents and the head's matrix are in memory."""
        layers = ReferenceModel(self._weights, max(len(document) for document in documents))
        hidden, count = layers.embed(documents), len(self._weights.decoder.layers)
        for i in range(count):
            self._progress("reference layers", i, count)
            hidden = layers.load_layer(i).forward(hidden)
        head = layers.head().read_all()
        for document, states in zip(documents, hidden, strict=True):
            for start, stop in position_ranges(document):
                yield layers.logits(layers.apply_final_norm(states[start:stop]), head)


class BundlePredictor:
    """A bundle."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def logits(self, documents: Sequence[Document]) -> Iterator[Array]:
        """See `Predictor`."""
        runner = open_runner(self._bundle, rows=1, context=max(len(document) for document in documents))
        for document in documents:
            for start, stop in position_ranges(document):
                yield runner.prefill(0, document[start:stop], start, all_logits=True, final_length=len(document))


def measure_agreement(
    bundle: Bundle,
    reference: Predictor,
    documents: Sequence[Document],
    progress: ProgressCallback,
    what: str = "verify",
) -> DivergenceReport:
    """Compare a bundle with its reference at every position with a next token. `what` names the progress.

    Raises `EdgelmError` if the vocabularies differ.
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
    """Raise `EdgelmError` if a bundle does not reach the limits."""
    if max_kl is not None and agreement.kl_mean > max_kl:
        raise EdgelmError(
            f"the bundle's mean KL divergence is {agreement.kl_mean:.4f}, --max-kl allows {max_kl}: calibrate with"
            " --method gptq, use a smaller --block-size or more bits"
        )
    if min_agreement is not None and agreement.top1_agreement < min_agreement:
        raise EdgelmError(
            f"the bundle and its checkpoint agree on {agreement.top1_agreement:.4f} of the most likely tokens,"
            f" --min-agreement asks for {min_agreement}: calibrate with --method gptq, use a smaller --block-size or"
            " more bits"
        )


def quality_facts(agreement: DivergenceReport, name: str, left_out: int = 0) -> dict[str, Any]:
    """Return the manifest's quality entry. `name`: the text's file name; `left_out`: its tokens not measured."""
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
