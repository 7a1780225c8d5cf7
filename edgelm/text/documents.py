"""Text files that hold several documents."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edgelm.errors import EdgelmError

SEPARATOR: Final = "<|endoftext|>"
"""A line with only this text separates documents."""


def read_text(file: str | Path, option: str) -> str:
    """Return a text file's content. Raises `EdgelmError` with the option's name if it cannot be read or is empty."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise EdgelmError(f"{option}: {file} cannot be read: {reason}") from error
    if not text.strip():
        raise EdgelmError(f"{option}: {file} is empty")
    return text


def split_documents(text: str) -> list[str]:
    """Split at lines that contain only the separator; outer newlines and empty documents are dropped."""
    documents: list[list[str]] = [[]]
    for line in text.split("\n"):
        if line.strip() == SEPARATOR:
            documents.append([])
        else:
            documents[-1].append(line)
    joined = ("\n".join(lines).strip("\n") for lines in documents)
    return [document for document in joined if document.strip()]
