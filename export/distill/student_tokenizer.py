"""A student's own tokenizer: byte-level BPE, saved as a Hugging Face tokenizer directory.

The tokenizer itself wraps a prompt as `<bos> prompt <answer>`, so a runtime only needs `encode(prompt)`. The answer
ends with `<eos>`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

EOS: Final = "<eos>"
BOS: Final = "<bos>"
ANSWER: Final = "<answer>"
SPECIAL_TOKENS: Final = (EOS, BOS, ANSWER)
"""Tokens 0, 1 and 2; not part of decoded text."""

CHAT_TEMPLATE: Final = BOS + "{{ messages[-1]['content'] }}" + ANSWER


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, pieces: Sequence[str] = (), *, spaces_apart: bool = False
) -> Tokenizer:
    """Train a byte-level BPE tokenizer that encodes and decodes any text unchanged.

    Parameters
    ----------
    texts
        Texts to learn merges from.
    vocab_size
        Number of all tokens: special tokens, 256 bytes, merges and `pieces`.
    pieces
        Texts that are one token each wherever they occur, and decode to themselves.
    spaces_apart
        Make each space a token of its own, so that a word has the same tokens everywhere; otherwise a word after a
        space has other tokens than after a quote.
    """
    tokenizer = Tokenizer(models.BPE())
    separate = Regex(r"\p{N}| ") if spaces_apart else Regex(r"\p{N}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(separate, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(pieces),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in pieces])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {ANSWER}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, ANSWER)],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json in the form that transformers' AutoTokenizer reads."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
