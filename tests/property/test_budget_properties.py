"""Choosing storage under a budget, against trying every combination."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import EdgelmError

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.quantize.budget import StorageOption, choose_options
from edgelm_export.quantize.spec import QuantSpec

OPTIONS = st.lists(
    st.builds(
        StorageOption,
        st.builds(QuantSpec, st.sampled_from([4, 8]), st.sampled_from([32, 64])),
        st.integers(1, 60),
        st.integers(0, 1000).map(lambda each: each / 1000),
    ),
    min_size=1,
    max_size=4,
)
MODELS = st.dictionaries(st.sampled_from("abcd"), OPTIONS, min_size=1)


def total(chosen):
    return sum(each.size_bytes for each in chosen), sum(each.kl for each in chosen)


def combinations(options):
    return [total(each) for each in itertools.product(*options.values())]


@given(MODELS, st.floats(0, 3))
def test_no_combination_with_as_few_bytes_has_less_divergence(options, max_kl):
    size, kl = total(choose_options(options, max_kl=max_kl).values())
    assert all(other_kl >= kl - 1e-9 for other_size, other_kl in combinations(options) if other_size <= size)
    if kl > max_kl:  # not reachable
        assert kl <= min(each for _, each in combinations(options)) + 1e-9


@given(MODELS, st.integers(1, 300))
def test_bytes_stay_within_the_limit_and_no_single_upgrade_fits(options, max_bytes):
    least = min(size for size, _ in combinations(options))
    if least > max_bytes:
        with pytest.raises(EdgelmError, match=f" {least} bytes.* {max_bytes} "):
            choose_options(options, max_bytes=max_bytes)
        return
    chosen = choose_options(options, max_bytes=max_bytes)
    assert chosen.keys() == options.keys()
    assert all(chosen[name] in options[name] for name in options)
    size, kl = total(chosen.values())
    assert size <= max_bytes
    # No single matrix could be stored better with what is left.
    for name, option in chosen.items():
        room = max_bytes - size + option.size_bytes
        better = [each for each in options[name] if each.size_bytes <= room and each.kl < option.kl - 1e-9]
        assert (
            not better
            or size + min(each.size_bytes for each in better) - option.size_bytes > max_bytes
            or _off_hull(options[name], better)
        )
    smallest = min((s, k) for s, k in combinations(options))
    assert kl <= smallest[1] + 1e-9


def _off_hull(options, better):
    """Return whether an option that fits lies above the convex hull of the others."""
    return any(
        first.size_bytes < each.size_bytes < last.bytes
        and (each.kl - last.kl) * (last.bytes - first.size_bytes)
        >= (first.kl - last.kl) * (last.bytes - each.size_bytes) - 1e-9
        for each in better
        for first in options
        for last in options
    )


@given(MODELS)
def test_a_limit_already_met_takes_the_smallest(options):
    size, _ = total(choose_options(options, max_kl=1e9).values())
    assert size == min(each for each, _ in combinations(options))


def test_the_sensitive_matrix_is_upgraded_first():
    coarse, fine = QuantSpec(4, 32), QuantSpec(8, 32)
    options = {
        "dull": [StorageOption(coarse, 10, 0.01), StorageOption(fine, 20, 0.0)],
        "touchy": [StorageOption(coarse, 10, 0.5), StorageOption(fine, 20, 0.0)],
    }
    chosen = choose_options(options, max_bytes=30)
    assert (chosen["dull"].spec, chosen["touchy"].spec) == (coarse, fine)
