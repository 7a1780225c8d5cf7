"""A checkpoint prepared for export: adapter merged and vocabulary pruned, both when the weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from edgelm.errors import CheckpointError
from edgelm.text.documents import read_text
from edgelm.text.static_prompt import PrefixText, check_prefix_tokens, tokenize_prefix
from edgelm.text.tokenizer import Tokenizer

from .architectures import find_architecture
from .architectures.decoder import DecoderConfig
from .architectures.weights import DecoderWeights
from .checkpoint import Checkpoint, TensorSource, metadata, open_checkpoint
from .checkpoint.lora import AdaptedWeights, open_adapter
from .vocabulary import PrunedVocabulary, PrunedWeights, prune_vocabulary

VOCABULARY = "vocabulary.json"
"""File of a bundle with a pruned vocabulary: the old id of each token, in order."""


@dataclass(frozen=True, slots=True)
class SourceModel:
    """The model that export, calibration and comparison read.

    tokenizer_text: the bundle's tokenizer.json. vocabulary: the pruned vocabulary, if any. adapter_name: the name of
    the adapter merged into `weights`, if any. prefix_tokens: tokens of the static prefix.
    """

    checkpoint: Checkpoint
    weights: DecoderWeights
    tokenizer_text: str
    vocabulary: PrunedVocabulary | None = None
    adapter_name: str | None = None
    prefix_tokens: tuple[int, ...] = ()

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder's shapes and options."""
        return self.weights.decoder

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer."""
        return Tokenizer(tokenizers.Tokenizer.from_str(self.tokenizer_text))

    @property
    def bos_token(self) -> int | None:
        """The id that starts a text; None if the checkpoint has none."""
        old = metadata.bos_token(self.checkpoint)
        return None if old is None else self._new_id(old)

    @property
    def eos_tokens(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return tuple(self._new_id(old) for old in metadata.eos_tokens(self.checkpoint))

    def _new_id(self, old: int) -> int:
        if self.vocabulary is None:
            return old
        new = self.vocabulary.new_id(old)
        if new is None:
            raise AssertionError(f"pruning dropped the required token {old}")
        return new


def open_source_model(source: str | Path, adapter: str | Path | None = None) -> SourceModel:
    """Open a checkpoint with its adapter. Raises `CheckpointError`."""
    checkpoint = open_checkpoint(source)
    architecture = find_architecture(checkpoint.config)
    decoder = architecture.read_config(checkpoint.config)
    metadata.check_tokenizer(checkpoint, decoder.vocab_size)
    tensors: TensorSource = checkpoint
    if adapter is not None:
        opened = open_adapter(adapter, {**checkpoint.config, "tie_word_embeddings": decoder.has_tied_head})
        opened.check(checkpoint.names)
        tensors = AdaptedWeights(checkpoint, opened)
    weights = DecoderWeights(tensors, decoder, architecture.tensor_names)
    name = None if adapter is None else Path(adapter).name
    return SourceModel(checkpoint, weights, checkpoint.tokenizer_text, adapter_name=name)


def prune_model(model: SourceModel, text_file: str | Path, size: int) -> SourceModel:
    """Return the model with a vocabulary of `size` tokens for the domain of a text. Raises `EdgelmError`."""
    vocabulary = prune_vocabulary(
        model.checkpoint.tokenizer_path,
        read_text(text_file, "--vocab"),
        size,
        model_vocab_size=model.decoder.vocab_size,
        required=metadata.required_tokens(model.checkpoint),
        contents=model.checkpoint.tokenizer_text,
    )
    return replace(
        with_vocabulary(model, vocabulary.kept_ids), tokenizer_text=vocabulary.tokenizer_text, vocabulary=vocabulary
    )


def with_static_prefix(model: SourceModel, opening: PrefixText, context: int) -> SourceModel:
    """Return the model with the bundle's static prefix. Raises `EdgelmError` if the prefix cannot be used."""
    special = metadata.special_tokens(model.checkpoint)
    tokenizer = Tokenizer(
        tokenizers.Tokenizer.from_str(model.tokenizer_text),
        metadata.chat_template(model.checkpoint),
        special_tokens=special,
        end_tokens=model.eos_tokens,
    )
    tokens = tokenize_prefix(opening, tokenizer)
    d = model.decoder
    check_prefix_tokens(tokens, context=context, vocab_size=d.vocab_size, long_from=d.long_from(context))
    return replace(model, prefix_tokens=tuple(tokens))


def with_vocabulary(model: SourceModel, kept: NDArray[np.int64]) -> SourceModel:
    """Return the model with only these tokens' rows in embedding and head. Raises `CheckpointError`."""
    d, names = model.decoder, model.weights.tensor_names
    if len(kept) and int(kept.max()) >= d.vocab_size:
        raise CheckpointError(
            f"{model.checkpoint.path} has {d.vocab_size} tokens, but the bundle keeps token {kept.max()}"
        )
    tensors = PrunedWeights(model.weights.source, kept, d.vocab_size, (names.embedding, names.head))
    smaller = replace(d, vocab_size=len(kept))
    return replace(model, weights=DecoderWeights(tensors, smaller, names))


def vocabulary_facts(model: SourceModel, row_bytes: float) -> dict[str, Any] | None:
    """Return the manifest's entry on pruning. `row_bytes`: bytes of one token in the bundle's tables."""
    if model.vocabulary is None:
        return None
    dropped = (
        find_architecture(model.checkpoint.config).read_config(model.checkpoint.config).vocab_size
        - model.vocabulary.size
    )
    return {
        "tokens_before": model.vocabulary.size + dropped,
        "tokens": model.vocabulary.size,
        "saved_bytes": round(dropped * row_bytes),
        "text_tokens_before": model.vocabulary.tokens_before,
        "text_tokens": model.vocabulary.tokens_after,
        "text_tokens_lost": model.vocabulary.tokens_lost,
        "sufficient_size": model.vocabulary.sufficient_size,
    }
