"""Self-generated calibration text, for exports without a text file: `--calibrate self`.

Text sampled at temperature 1 follows the distribution that the model has learned, which is closer to its later inputs
than arbitrary text (the data-free quantization-aware training of Liu et al. 2023, arXiv:2305.17888, section 3.1, does
the same). An int8 bundle samples it; its predictions are close to the checkpoint's.
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
"""Maximum sampled tokens. To save time, a large model samples two thirds of the tokens it would use from a file."""

DOCUMENT_TOKENS: Final = 256
"""Tokens of each document."""

BATCH_DOCUMENTS: Final = 32
"""Documents sampled in one batch."""


def sample_calibration_documents(
    model: SourceModel, context: int, progress: ProgressCallback, beside: Path | None
) -> list[Document]:
    """Return self-generated documents of at most `DOCUMENT_TOKENS` tokens, the same for the same model.

    The temporary int8 bundle is written to the directory `beside`, or to the system's temporary directory.
    """
    length = min(DOCUMENT_TOKENS, context)
    with tempfile.TemporaryDirectory(prefix=".sampled.", dir=beside) as folder:
        plan = QuantPlan(QuantSpec(8, DEFAULT_BLOCK_SIZE, True, "rtn"))
        manifest = write_bundle(Path(folder), model, plan, "int8", length, ignore_progress)
        runner = open_runner(Bundle(Path(folder), manifest), rows=BATCH_DOCUMENTS)
        generator = np.random.Generator(np.random.PCG64(0))
        found: list[Document] = []
        tokens = min(MAX_SAMPLED_TOKENS, calibration_token_count(model.decoder.parameters) * 2 // 3)
        wanted = max(1, tokens // (DOCUMENT_TOKENS * BATCH_DOCUMENTS)) * BATCH_DOCUMENTS
        while len(found) < wanted:
            progress("sampling calibration text", len(found), wanted)
            found += _sample_batch(runner, _first_tokens(model, generator), length, model.eos_tokens, generator)
        del runner  # before its files are removed
    return found


def generate_documents(bundle: Bundle, model: SourceModel) -> tuple[Runner, list[Document]]:
    """Return a runner of a bundle, and `BATCH_DOCUMENTS` documents that it generated.

    The rows of the runner's KV cache hold all their positions.
    """
    length = min(DOCUMENT_TOKENS, bundle.manifest.context)
    runner = open_runner(bundle, rows=BATCH_DOCUMENTS, context=length)
    generator = np.random.Generator(np.random.PCG64(0))
    written = _sample_batch(runner, _first_tokens(model, generator), length, model.eos_tokens, generator)
    runner.decode(np.stack(written)[:, -1], np.full(BATCH_DOCUMENTS, length - 1, np.int32))
    return runner, written


def _first_tokens(model: SourceModel, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return the first tokens: the start token, if there is one, for every second document, random tokens for others.

    Text after the start token alone may be of one kind, such as conversations for a chat model.
    """
    limit = min(model.decoder.vocab_size, model.tokenizer.base_vocab_size)
    tokens = generator.integers(0, limit, BATCH_DOCUMENTS, dtype=np.int64)
    if model.bos_token is not None:
        tokens[::2] = model.bos_token
    return tokens


def _sample_batch(
    runner: Runner,
    first: NDArray[np.int64],
    length: int,
    ends: tuple[int, ...],
    generator: np.random.Generator,
) -> list[Document]:
    """Sample documents together, one token per step. End tokens are excluded, so all have the same length."""
    tokens = np.empty((len(first), length), np.int64)
    tokens[:, 0] = first
    for at in range(1, length):
        lengths = np.full(len(first), at - 1, np.int32)
        logits = runner.decode(tokens[:, at - 1], lengths)
        logits[:, list(ends)] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        reached = np.cumsum(weights, axis=1, dtype=np.float64)
        drawn = generator.random(len(first)) * reached[:, -1]
        tokens[:, at] = (reached > drawn[:, None]).argmax(axis=1)
    return list(tokens)
