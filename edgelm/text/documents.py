"""Text files of several documents."""

from __future__ import annotations

from typing import Final

SEPARATOR: Final = "<|endoftext|>"
"""A line of its own that divides documents."""


def split_documents(text: str) -> list[str]:
    """Split at lines that hold only the separator; outer newlines and empty documents are dropped."""
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip() == SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    joined = ("\n".join(lines).strip("\n") for lines in documents)
    return [document for document in joined if document.strip()]
