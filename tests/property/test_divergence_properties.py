"""Divergence of two models' predictions, compared with the formulas in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgelm.errors import EdgelmError
from edgelm.runtime.divergence import DivergenceMeter

LOGITS = st.floats(-30, 30, width=32)


@st.composite
def pairs(draw):
    """Logits of two models float32 [n, V] and the tokens that followed."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 5)))
    first, second = (draw(hnp.arrays(np.float32, shape, elements=LOGITS)) for _ in range(2))
    return first, second, draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, shape[1] - 1)))


def shares(row):
    exponents = [math.exp(float(value) - max(map(float, row))) for value in row]
    return [each / sum(exponents) for each in exponents]


@given(pairs())
def test_the_report_equals_the_formulas(pair):
    reference, logits, following = pair
    divergence = DivergenceMeter()
    half = len(following) // 2
    for part in (slice(0, half), slice(half, None)):  # in parts, as it is used; an empty part changes nothing
        divergence.add(reference[part], logits[part], following[part])
    found = divergence.result()
    expected = [shares(row) for row in reference]
    own = [shares(row) for row in logits]
    kl = [
        sum(p * (math.log(p) - math.log(q)) for p, q in zip(a, b, strict=True) if p > 0)
        for a, b in zip(expected, own, strict=True)
    ]
    assert found.tokens == len(following)
    assert found.kl_mean == pytest.approx(sum(kl) / len(kl), abs=1e-9)
    assert found.kl_p99 == pytest.approx(max(0, np.quantile(kl, 0.99)), abs=1e-9)
    for value, rows in ((found.perplexity, own), (found.reference_perplexity, expected)):
        nats = -sum(math.log(row[token]) for row, token in zip(rows, following, strict=True)) / len(following)
        assert math.log(value) == pytest.approx(nats, abs=1e-9)
    same = [int(a.argmax()) == int(b.argmax()) for a, b in zip(reference, logits, strict=True)]
    assert found.top1_agreement == pytest.approx(sum(same) / len(same))


@given(pairs())
def test_a_model_agrees_with_itself(pair):
    reference, _, following = pair
    divergence = DivergenceMeter()
    divergence.add(reference, reference, following)
    found = divergence.result()
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0, 0, 1)
    assert found.perplexity == found.reference_perplexity


def test_no_positions_and_logits_that_are_not_finite_are_refused():
    with pytest.raises(EdgelmError):
        DivergenceMeter().result()
    good = np.zeros((1, 3), np.float32)
    for bad in (np.full((1, 3), np.nan, np.float32), np.full((1, 3), np.inf, np.float32)):
        for first, second in ((good, bad), (bad, good)):
            with pytest.raises(EdgelmError):
                DivergenceMeter().add(first, second, np.zeros(1, np.int64))
