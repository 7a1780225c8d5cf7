"""Documents and windows of an evaluation: every token is scored exactly once."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import EdgelmError
from edgelm.evaluation.evaluate import _windows, evaluate_text
from edgelm.text.documents import SEPARATOR, split_documents

lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), max_size=20)


@given(length=st.integers(0, 400), context=st.integers(2, 100))
def test_every_token_after_the_first_is_scored_once_with_at_least_half_a_context(length, context):
    ids = list(range(length))
    scored = []
    for window, new in _windows(ids, context):
        assert 2 <= len(window) <= context
        assert window == ids[window[0] : window[0] + len(window)]
        assert 1 <= new < len(window)
        first = not scored
        assert first or len(window) - new >= context // 2
        scored += window[len(window) - new :]
    assert scored == ids[1:]


@given(
    documents=st.lists(
        st.lists(lines.filter(lambda line: line.strip() not in ("", SEPARATOR)), min_size=1, max_size=4), max_size=5
    ),
    blanks=st.integers(0, 2),
)
def test_joined_documents_are_split_again(documents, blanks):
    texts = ["\n".join(document) for document in documents]
    gap = "\n" * blanks
    text = f"{gap}\n{SEPARATOR}\n{gap}".join(texts) + gap
    assert split_documents(text) == texts


@given(text=st.lists(lines | st.sampled_from([SEPARATOR, f" {SEPARATOR} ", f"x{SEPARATOR}", ""])).map("\n".join))
def test_no_document_is_empty_or_contains_a_separator_line(text):
    for document in split_documents(text):
        assert document.strip()
        assert all(line.strip() != SEPARATOR for line in document.split("\n"))


def test_perplexity_is_that_of_the_scores(model):
    documents = ["Once upon a time there was a cat.", "The dog", "Größe 東京 🙂"]
    scores = [model.score(document) for document in documents]
    nats = -sum(float(score.sum()) for score in scores)
    count = sum(len(score) for score in scores)
    assert count == sum(len(model.document_tokens(document)) - 1 for document in documents)
    quality = evaluate_text(model, documents)
    assert quality.tokens == count
    assert quality.perplexity == pytest.approx(math.exp(nats / count))
    assert quality.bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(d.encode()) for d in documents))
    assert (quality.documents, quality.truncated, quality.skipped) == (3, 0, 0)


def test_long_documents_are_cut_or_scored_in_windows(model):
    context = model.context
    document = "Once upon a time there was a cat. " * (context // 4)
    ids = model.document_tokens(document)
    assert len(ids) > 2 * context
    cut = evaluate_text(model, [document])
    assert (cut.tokens, cut.truncated, cut.skipped) == (context - 1, 1, len(ids) - context)
    assert cut.perplexity == pytest.approx(math.exp(-model.score_tokens(ids[:context]).mean()))
    windowed = evaluate_text(model, [document], long_documents="window")
    assert (windowed.tokens, windowed.truncated, windowed.skipped) == (len(ids) - 1, 0, 0)


@pytest.mark.parametrize("documents", [[], [""]])
def test_nothing_to_score_is_an_error(documents, model):
    with pytest.raises(EdgelmError, match="token"):
        evaluate_text(model, documents)
