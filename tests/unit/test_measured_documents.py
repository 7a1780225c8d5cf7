"""Text to measure on: all of it is used, in sequences, or the number of omitted tokens is returned."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.calibration.text_samples import (
    EVALUATION_DOCUMENT_TOKENS,
    MAX_EVALUATION_TOKENS,
    evaluation_documents,
)
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import EdgelmError


class Letters:
    """A tokenizer with one token per letter."""

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in text]


DIVIDER = "\n<|endoftext|>\n"


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=4), st.sampled_from([None, 7]), st.integers(2, 5000))
def test_every_token_of_a_short_text_is_measured_once(lengths, bos, context):
    texts = ["".join(chr(97 + (i + n) % 26) for n in range(length)) for i, length in enumerate(lengths)]
    try:
        found = evaluation_documents(DIVIDER.join(texts), Letters(), bos, context)
    except EdgelmError:
        assert bos is None
        assert max(lengths) == 1
        return
    assert found.left_out_tokens == 0
    own = 0 if bos is None else 1
    said = "".join(chr(token) for document in found.documents for token in document[own:])
    lost = sum(map(len, texts)) - len(said)
    assert 0 <= lost <= (0 if own else len(texts))  # a last piece of one token, with nothing before it
    for document in found.documents:
        assert 2 <= len(document) <= min(EVALUATION_DOCUMENT_TOKENS, context)
        assert bos is None or document[0] == bos
    if not lost:
        assert said == "".join(texts)


def test_sequences_of_a_long_text_are_taken_evenly_and_the_rest_is_counted():
    text = "abcdefgh" * (MAX_EVALUATION_TOKENS // 2)
    found = evaluation_documents(text, Letters(), None, 4096)
    taken = sum(map(len, found.documents))
    assert taken == MAX_EVALUATION_TOKENS
    assert found.left_out_tokens == len(text) - taken
    assert all(isinstance(document, np.ndarray) for document in found.documents)


def test_a_text_without_a_token_to_predict_is_refused():
    with pytest.raises(EdgelmError, match="--verify"):
        evaluation_documents("a", Letters(), None, 64)
