"""How far each form's predictions are from the checkpoint's: one judge, the same tokens."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer

from edgelm.text.documents import split_documents
from tests.bench.judge import Corpus, judge
from tests.bench.peers.building import Failed
from tests.bench.peers.shapes import Facts
from tests.bench.peers.sides import Side
from tests.bench.peers.turns import ask

REFERENCE: Final = Side("reference", "transformers", "checkpoint", job={"kind": "transformers", "dtype": "float32"})
DOCUMENT: Final = 64
"""Tokens of a document that the model makes up."""


def make_corpus(checkpoint: Path, text: Path | None, tokens: int, out: Path, threads: int, work: Path) -> Corpus:
    """Write the tokens that all are judged on: a text's, or made up by the checkpoint itself."""
    facts = Facts.of(checkpoint)
    if text is None:
        job = {"what": "sample", "model": str(checkpoint), "threads": threads, "seed": 0, "out": str(out)}
        job |= {"documents": -(-tokens // DOCUMENT), "length": DOCUMENT, "first": facts.first_token}
        ask(sys.executable, REFERENCE, job | REFERENCE.job, work)
    else:
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        documents, count = [], 0
        for document in split_documents(text.read_text(encoding="utf-8")):
            ids = [facts.first_token, *tokenizer.encode(document, add_special_tokens=False).ids]
            documents.append(np.array(ids[: min(facts.context - 1, tokens - count)]))
            count += len(documents[-1])
            if count >= tokens - 1:
                break
        np.savez(out, tokens=np.concatenate(documents), lengths=np.array([len(each) for each in documents]))
    stored = np.load(out)
    return Corpus(stored["tokens"], stored["lengths"])


class Closeness:
    """Judges forms of one checkpoint."""

    def __init__(
        self, checkpoint: Path, text: Path | None, tokens: int, folder: Path, threads: int, work: Path
    ) -> None:
        self.threads, self.folder, self.work = threads, folder, work
        self.tokens = folder / "tokens.npz"
        self.corpus = make_corpus(checkpoint, text, tokens, self.tokens, threads, work)
        self.reference = self._logits(sys.executable, REFERENCE, str(checkpoint), "reference.npy")

    def of(self, python: str, side: Side, model: str) -> dict[str, Any]:
        """Return perplexities, KL and agreement of a side. Raises `Failed`."""
        path = self.folder / "logits.npy"
        logits = self._logits(python, side, model, path.name)
        try:
            return asdict(judge(self.reference, logits, self.corpus))
        finally:
            path.unlink()

    def _logits(self, python: str, side: Side, model: str, name: str) -> np.ndarray:
        out = self.folder / name
        context = int(self.corpus.lengths.max()) + 1
        job = {"what": "logits", "model": model, "threads": self.threads, "context": context}
        job |= {"tokens": str(self.tokens), "out": str(out)}
        ask(python, side, job | side.job, self.work)
        logits: np.ndarray = np.load(out, mmap_mode="r")
        if len(logits) != len(self.corpus.tokens):
            raise Failed("logits of other tokens")
        return logits
