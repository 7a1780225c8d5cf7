"""The kernels refuse invalid inputs, and read and write nothing outside their inputs and outputs.

A graph is untrusted: for any shapes and values that reach an operator in a call, it returns the correct result or an
error. All arrays end in front of a page without access rights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from attention_cases import Case
from attention_nodes import ours, run
from attention_nodes import session_of as attention_session
from guard_pages import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_nodes import gather_rows, matrix, product
from kernel_nodes import run as run_product
from naive_kernel_attention import Shape

from edgelm.kernels.abi import ERROR_MESSAGES, NO_OFFSET, InputErrorCode, StateField, WeightFormat
from edgelm.kernels.custom_ops import CustomOpLibrary
from edgelm.kernels.op_schemas import ATTENTION_SCHEMA, gather_schema, matmul_schema
from edgelm.system.digest import file_sha256

FORMAT = WeightFormat(4, 32)
K, N = 48, 20
ANY_MESSAGE = "|".join(ERROR_MESSAGES.values())


def refused(call, code=None):
    """Expect a call to end in an input error, of the given code if there is one."""
    with pytest.raises(Exception, match=ANY_MESSAGE if code is None else ERROR_MESSAGES[code]) as caught:
        call()
    assert "INVALID_ARGUMENT" in str(caught.value) or "Non-zero status" in str(caught.value)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(3)
    return matrix(rng, FORMAT, K, N)


dims = st.lists(st.integers(0, 3), max_size=9)
lasts = st.sampled_from([0, 1, K - 1, K, K, K, K + 1, 2 * K])


@settings(max_examples=60, deadline=None)
@given(dims, lasts, st.booleans(), st.sampled_from(["none", "alike", "longer", "flat", "other"]))
def test_a_product_is_correct_or_refused(library, table, leading, last, gated, skipped):
    codes, scales, _ = table
    skip_at = {
        "none": None,
        "alike": [*leading, N],
        "longer": [1, *leading, N],
        "flat": [N],
        "other": [*leading, N + 1],
    }
    session = product(library, FORMAT, K, codes, scales, gated=gated, skip=skipped != "none", threads=1)
    rng = np.random.default_rng(5)
    x = guarded(rng.normal(size=[*leading, last]).astype(np.float32))
    shape = skip_at[skipped]
    skip = None if shape is None else guarded(np.ones(shape, np.float32))
    fits = last == (2 * K if gated else K) and len(leading) < 8 and (skip is None or shape == [*leading, N])
    if not fits:
        refused(lambda: run_product(session, x, skip))
        return
    found = run_product(session, x, skip)
    assert found.shape == (*leading, N)
    rows = x.reshape(-1, last)
    alone = product(library, FORMAT, K, codes, scales, gated=gated, threads=1)
    for i in range(len(rows)):
        one = run_product(alone, rows[i : i + 1])[0] + (0 if skip is None else 1)
        np.testing.assert_allclose(found.reshape(-1, N)[i], one, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=9), st.integers(-(2**63), 2**63 - 1))
def test_a_gather_is_correct_or_refused(library, table, shape, index):
    codes, scales, _ = table
    blocks = scales.shape[1]
    indices = guarded(np.full(shape, index, np.int64))
    if len(shape) > 7:
        refused(lambda: gather_rows(library, FORMAT, codes, scales, indices), InputErrorCode.RANK)
        return
    found = gather_rows(library, FORMAT, codes, scales, indices)
    assert found.shape == (*shape, blocks * FORMAT.block_size)
    nearest = min(max(index + N if index < 0 else index, 0), N - 1)
    expected = gather_rows(library, FORMAT, codes, scales, np.array([nearest]))[0]
    for row in found.reshape(-1, blocks * FORMAT.block_size):
        np.testing.assert_array_equal(row, expected)


@dataclass
class Change:
    """A change of one input of attention: another dimension or other values."""

    name: str
    axis: int
    by: int

    def of(self, feeds):
        value = feeds[self.name]
        if self.name in ("seqlens", "positions") and self.axis > 1:
            changed = value.copy()
            changed.reshape(-1)[:1] = np.array(self.by * 10**6 if self.by > 2 else self.by, changed.dtype)
            return {**feeds, self.name: changed}
        if self.axis >= value.ndim:
            return {**feeds, self.name: value.reshape(1, *value.shape)}
        shape = list(value.shape)
        shape[self.axis] = max(0, shape[self.axis] + self.by)
        return {**feeds, self.name: np.zeros(shape, value.dtype)}


def fits(shape, feeds):
    """Return whether the operator allows these inputs."""
    q, past, other = feeds["query"], feeds["past_key"], feeds["past_value"]
    if q.ndim != 3 or past.ndim != 4 or past.shape != other.shape:
        return False
    batch, tokens, width = q.shape
    rows, kv_heads, capacity, size = past.shape
    own, keys = shape.heads * size, kv_heads * size
    if rows != batch or kv_heads != shape.kv_heads or size % 16 or not 0 < size <= 256 or tokens > capacity:
        return False
    if width > own:
        if width != own + 2 * keys:
            return False
    elif width != own or any(
        name not in feeds or feeds[name].shape != (batch, tokens, keys) for name in ("key", "value")
    ):
        return False
    lengths = feeds["seqlens"].astype(np.int64)
    if lengths.size != batch or ((lengths < tokens - 1) | (lengths >= capacity)).any() or lengths.ndim > 8:
        return False
    if not shape.half:
        return True
    cos, sin = feeds["cos"], feeds["sin"]
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != shape.half or 2 * shape.half > size:
        return False
    if "positions" in feeds:
        places = feeds["positions"]
        return places.size == batch * tokens and ((places >= 0) & (places < len(cos))).all() and places.ndim <= 8
    return not len(lengths) or lengths.max() < len(cos)


names = st.sampled_from(
    ["query", "key", "value", "past_key", "past_value", "seqlens", "cos", "sin", "positions", "query", "seqlens"]
)
changes = st.builds(Change, names, st.integers(0, 4), st.sampled_from([-300, -16, -1, 0, 1, 2, 16, 300]))


@settings(max_examples=150, deadline=None)
@given(st.lists(changes, max_size=2), st.booleans(), st.booleans(), st.sampled_from([0, 8, 3]), st.integers(1, 4))
def test_attention_is_correct_or_refused(library_operators, several, packed, has_positions, half, tokens):
    shape = Shape(4, 2, 16, half=half, scale=0.25)
    case = Case(shape, 1, batch=2, tokens=tokens, longest=40, has_positions=has_positions)
    feeds = case.feeds(packed)
    for change in several:
        if change.name in feeds:
            feeds = change.of(feeds)
    feeds = {name: guarded(value) for name, value in feeds.items()}
    session = attention_session(ours(shape, feeds), feeds, operators=library_operators, threads=1)
    before = feeds["past_key"].copy(), feeds["past_value"].copy()
    if not fits(shape, feeds):
        refused(lambda: run(session, feeds))
        np.testing.assert_array_equal(feeds["past_key"], before[0])
        np.testing.assert_array_equal(feeds["past_value"], before[1])
        return
    found = run(session, feeds)
    assert found.shape == (*feeds["query"].shape[:2], shape.heads * feeds["past_key"].shape[3])
    if not several:
        np.testing.assert_allclose(found, case.expected()[0], rtol=1e-4, atol=1e-5)


def cut(names, rows):
    return lambda feeds: {name: value[:rows] if name in names else value for name, value in feeds.items()}


def numbers(name, value):
    return lambda feeds: {**feeds, name: np.full_like(feeds[name], value)}


def zeros(name, *shape):
    return lambda feeds: {**feeds, name: np.zeros(shape, feeds[name].dtype)}


def without(name):
    return lambda feeds: {each: value for each, value in feeds.items() if each != name}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (zeros("query", 2, 3, 128, 1), InputErrorCode.RANK),
        (zeros("query", *[1] * 12, 128), InputErrorCode.RANK),
        (zeros("query", 2, 3, 127), InputErrorCode.PROJECTIONS),
        (zeros("query", 2, 3, 129), InputErrorCode.PROJECTIONS),
        (zeros("query", 2, 3, 64), InputErrorCode.PROJECTIONS),
        (zeros("query", 3, 3, 128), InputErrorCode.KV_CACHE),
        (zeros("query", 2, 60, 128), InputErrorCode.TOKENS),
        (zeros("past_key", 2, 2, 50, 32), InputErrorCode.KV_CACHE),
        (zeros("past_key", 2, 1, 50, 16), InputErrorCode.KV_CACHE),
        (zeros("past_value", 2, 2, 49, 16), InputErrorCode.KV_CACHE),
        (zeros("past_value", 2, 2, 16), InputErrorCode.RANK),
        (zeros("seqlens"), InputErrorCode.LENGTHS),
        (zeros("seqlens", 1), InputErrorCode.LENGTHS),
        (zeros("seqlens", 0), InputErrorCode.LENGTHS),
        (numbers("seqlens", 1), InputErrorCode.LENGTHS),
        (numbers("seqlens", -1), InputErrorCode.LENGTHS),
        (numbers("seqlens", 50), InputErrorCode.LENGTHS),
        (numbers("seqlens", 2**31 - 1), InputErrorCode.LENGTHS),
        (numbers("seqlens", -(2**31)), InputErrorCode.LENGTHS),
        (cut({"cos", "sin"}, 1), InputErrorCode.TABLES),
        (cut({"cos", "sin"}, 7), InputErrorCode.TABLES),
        (cut({"cos"}, 40), InputErrorCode.TABLES),
        (zeros("cos", 50, 7), InputErrorCode.TABLES),
        (zeros("cos", 400), InputErrorCode.RANK),
        (without("sin"), InputErrorCode.TABLES),
        (zeros("positions", 2, 2), InputErrorCode.POSITIONS),
        (numbers("positions", -1), InputErrorCode.POSITIONS),
        (numbers("positions", 50), InputErrorCode.POSITIONS),
        (numbers("positions", 1 << 40), InputErrorCode.POSITIONS),
    ],
)
def test_each_error_of_attention_has_its_code(library_operators, change, code):
    """For 2 rows, 4 query heads and 2 KV heads of size 16, 5 past positions, 3 new ones, a capacity of 50."""
    shape = Shape(4, 2, 16, half=8, scale=0.25)
    rng = np.random.default_rng(0)
    feeds = {
        "query": rng.normal(size=(2, 3, 128)).astype(np.float32),
        "past_key": rng.normal(size=(2, 2, 50, 16)).astype(np.float32),
        "past_value": rng.normal(size=(2, 2, 50, 16)).astype(np.float32),
        "seqlens": np.full(2, 7, np.int32),
        "cos": np.ones((50, 8), np.float32),
        "sin": np.ones((50, 8), np.float32),
    }
    if code is InputErrorCode.POSITIONS:
        feeds["positions"] = np.full((2, 3), 49)

    def call(feeds):
        feeds = {name: guarded(value) for name, value in feeds.items()}
        return run(attention_session(ours(shape, feeds), feeds, operators=library_operators, threads=1), feeds)

    assert call(feeds).shape == (2, 3, 64)
    refused(lambda: call(change(feeds)), code)


@pytest.fixture(scope="module")
def library_operators(library, tmp_path_factory):
    data = tmp_path_factory.mktemp("none") / "data"
    data.write_bytes(b"none")
    return CustomOpLibrary(library, [], data, file_sha256(library))


HEADS = {
    StateField.HEADS: 4,
    StateField.KV_HEADS: 2,
    StateField.HALF: 8,
    StateField.WINDOW: 0,
    StateField.SCALE: 0,
    StateField.SOFTCAP: 0,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product([StateField.HEADS, StateField.KV_HEADS], [0, -1, 3, 1 << 40]),
        (StateField.HEADS, 66),
        (StateField.HALF, -1),
        (StateField.HALF, 129),
        (StateField.WINDOW, -1),
    ],
)
def test_unsupported_heads_are_refused(field, value):
    assert ATTENTION_SCHEMA.bytes_at(HEADS) == {}
    with pytest.raises(ValueError, match=rf"(?<![\d-]){value}\b"):
        ATTENTION_SCHEMA.bytes_at({**HEADS, field: value})


@pytest.mark.parametrize(("size", "columns"), [(0, 4), (-1, 4), (1 << 40, 4), (4, 0), (4, 1 << 60)])
@pytest.mark.parametrize("operator", [matmul_schema(FORMAT), gather_schema(FORMAT)])
def test_invalid_matrix_sizes_are_refused(operator, size, columns):
    with pytest.raises(ValueError, match=f"N {columns} and K {size} "):
        operator.bytes_at({StateField.K: size, StateField.N: columns})


@pytest.mark.parametrize("field", ["WEIGHTS", "SCALES", "BIAS", "NORM"])
@pytest.mark.parametrize("at", [-64, 1 << 44, 32, "end", NO_OFFSET])
def test_offsets_outside_the_file_are_refused(library, table, monkeypatch, field, at):
    import kernel_nodes

    codes, scales, bias = table
    data_offsets = kernel_nodes.data_offsets

    def moved(pieces):
        offsets = data_offsets(pieces)
        size = sum(-(-piece.nbytes // 64) * 64 for piece in pieces.values())
        return {**offsets, field: size if at == "end" else at}

    monkeypatch.setattr(kernel_nodes, "data_offsets", moved)
    if at == NO_OFFSET and field in ("BIAS", "NORM"):
        product(library, FORMAT, K, codes, scales, bias=bias, norm=np.ones(K, np.float32))
        return
    with pytest.raises(Exception, match=rf"{field} -?\d+"):
        product(library, FORMAT, K, codes, scales, bias=bias, norm=np.ones(K, np.float32))
