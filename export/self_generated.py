"""Self-generated calibration text, for exports without a text file: `--calibrate self`.

Text sampled at temperature 1 has the distribution that the model has learnt, which is nearer to its later inputs than
text picked at random (data-free quantization-aware training of Liu et al. 2023, arXiv:2305.17888, section 3.1, does the
same). An int8 bundle, whose predictions are close to the checkpoint's, samples it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.bundle_folder import Bundle
from edgelm.runtime.runner import Runner, open_runner

from .calibration.text_samples import Document, calibration_token_count
from .progress_callback import ProgressCallback, ignore_progress
from .quantize.matrix_plan import DEFAULT_BLOCK_SIZE, QuantPlan
from .quantize.spec import QuantSpec
from .source_model import SourceModel
from .write.bundle import write_bundle

MAX_SAMPLED_TOKENS: Final = 24576
"""Most tokens that are sampled. A large model samples fewer, two thirds of what it takes from a file, to save time."""

DOCUMENT_TOKENS: Final = 256
"""Length of each document."""

BATCH_DOCUMENTS: Final = 32
"""Documents that are sampled in one batch."""


def sample_calibration_documents(
    model: SourceModel, context: int, progress: ProgressCallback, beside: Path | None
) -> list[Document]:
    """Return self-generated documents of at most `DOCUMENT_TOKENS` tokens; the same model gives the same documents.

    The int8 bundle lies in a directory `beside`, or among the system's temporary ones, while it is needed.
    """
    length = min(DOCUMENT_TOKENS, context)
    with tempfile.TemporaryDirectory(prefix=".sampled.", dir=beside) as folder:
        plan = QuantPlan(QuantSpec(8, DEFAULT_BLOCK_SIZE, True, "rtn"))
        manifest = write_bundle(Path(folder), model, plan, "int8", length, ignore_progress)
        session = open_runner(Bundle(Path(folder), manifest), rows=BATCH_DOCUMENTS)
        generator = np.random.Generator(np.random.PCG64(0))
        found: list[Document] = []
        tokens = min(MAX_SAMPLED_TOKENS, calibration_token_count(model.decoder.parameters) * 2 // 3)
        wanted = max(1, tokens // (DOCUMENT_TOKENS * BATCH_DOCUMENTS)) * BATCH_DOCUMENTS
        while len(found) < wanted:
            progress("sampling calibration text", len(found), wanted)
            found += _sample_batch(session, _first_tokens(model, generator), length, model.eos_tokens, generator)
        del session  # before its files go
    return found


def generate_documents(bundle: Bundle, model: SourceModel) -> tuple[Runner, list[Document]]:
    """Return a runner, and `BATCH_DOCUMENTS` documents that a bundle generated with it.

    The rows of its KV cache hold all their positions.
    """
    length = min(DOCUMENT_TOKENS, bundle.manifest.context)
    session = open_runner(bundle, rows=BATCH_DOCUMENTS, context=length)
    generator = np.random.Generator(np.random.PCG64(0))
    written = _sample_batch(session, _first_tokens(model, generator), length, model.eos_tokens, generator)
    session.decode(np.stack(written)[:, -1], np.full(BATCH_DOCUMENTS, length - 1, np.int32))
    return session, written


def _first_tokens(model: SourceModel, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the start token, where there is one, for every second document, and any of the tokenizer's for others.

    What follows a start token alone may be all of one kind: conversations, where a model was trained to hold them.
    """
    limit = min(model.decoder.vocab_size, model.tokenizer.base_vocab_size)
    tokens = generator.integers(0, limit, BATCH_DOCUMENTS, dtype=np.int64)
    if model.bos_token is not None:
        tokens[::2] = model.bos_token
    return tokens


def _sample_batch(
    session: Runner,
    first: NDArray[np.int64],
    length: int,
    ends: tuple[int, ...],
    generator: np.random.Generator,
) -> list[Document]:
    """Sample documents together, one token a step; none ends before its length."""
    tokens = np.empty((len(first), length), np.int64)
    tokens[:, 0] = first
    for at in range(1, length):
        lengths = np.full(len(first), at - 1, np.int32)
        logits = session.decode(tokens[:, at - 1], lengths)
        logits[:, list(ends)] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        reached = np.cumsum(weights, axis=1, dtype=np.float64)
        drawn = generator.random(len(first)) * reached[:, -1]
        tokens[:, at] = (reached > drawn[:, None]).argmax(axis=1)
    return list(tokens)
