"""A pruned tokenizer loses no text and encodes kept tokens as before: every kind, any size, any text."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from prunable_tokenizers import DOMAIN, KINDS, write
from tiny import TinyLlama
from vocabularies import TEXTS

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.checkpoint import Checkpoint, open_checkpoint
from edgelm_export.vocabulary import PrunedVocabulary, PrunedWeights, prune_vocabulary

from edgelm.errors import CheckpointError, EdgelmError

WORDS = sorted({word for text in TEXTS for word in text.split(" ")})
PIECES = st.sampled_from(
    [*WORDS, " the", " ", "  ", "\n", "\n\n", "é", "漢字", "😀", "kitchen light", "<s>", "<0x41>", "e"]
)
TEXT = st.one_of(
    st.lists(PIECES, max_size=12).map(" ".join),
    st.lists(PIECES, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
)
SHARES = st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.9, 1.0])
Original = tuple[Path, tokenizers.Tokenizer]


@pytest.fixture(scope="module", params=[*KINDS, "stories260K"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """A tokenizer.json, and its tokenizer without truncation or padding."""
    if request.param == "stories260K":
        path = request.getfixturevalue("stories_checkpoint") / "tokenizer.json"
    else:
        path = write(tmp_path_factory.mktemp("tokenizer"), request.param)
    return path, plain(tokenizers.Tokenizer.from_file(str(path)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(TinyLlama(layers=1).write(tmp_path_factory.mktemp("checkpoint") / "model"))


def plain(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def total(tokenizer: tokenizers.Tokenizer) -> int:
    return tokenizer.get_vocab_size(with_added_tokens=True)


def least(path: Path, rows: int, required: Collection[int] = ()) -> int:
    """The least size that is not refused, from the error for a smaller one."""
    with pytest.raises(EdgelmError, match=r"choose at least \d+$") as refusal:
        prune_vocabulary(path, DOMAIN, 0, model_vocab_size=rows, required=required)
    size = int(str(refusal.value).split()[-1])
    with pytest.raises(EdgelmError, match=f"choose at least {size}$"):
        prune_vocabulary(path, DOMAIN, size - 1, model_vocab_size=rows, required=required)
    return size


@cache
def pruned(path: Path, share: float) -> tuple[PrunedVocabulary, tokenizers.Tokenizer]:
    """Prune to a size between the least and all, by `share`."""
    rows = total(tokenizers.Tokenizer.from_file(str(path)))
    low = least(path, rows)
    result = prune_vocabulary(path, DOMAIN, low + round(share * (rows - low)), model_vocab_size=rows + 7)
    return result, plain(tokenizers.Tokenizer.from_str(result.tokenizer_text))


@given(text=TEXT, share=SHARES, special=st.booleans())
def test_every_text_decodes_as_before(original: Original, text: str, share: float, special: bool) -> None:
    path, before = original
    result, after = pruned(path, share)
    ids = after.encode(text, add_special_tokens=special).ids
    assert all(0 <= token < result.size for token in ids)
    old = before.encode(text, add_special_tokens=special).ids
    for skip in (True, False):
        assert after.decode(ids, skip_special_tokens=skip) == before.decode(old, skip_special_tokens=skip)


@given(text=TEXT, share=SHARES, special=st.booleans())
def test_a_text_of_kept_tokens_is_encoded_as_before(original: Original, text: str, share: float, special: bool) -> None:
    path, before = original
    result, after = pruned(path, share)
    ids = after.encode(text, add_special_tokens=special).ids
    old = before.encode(text, add_special_tokens=special).ids
    if set(old) <= set(result.kept_ids.tolist()):
        assert result.kept_ids[ids].tolist() == old
    else:
        assert len(ids) >= len(old)


@given(share=SHARES, data=st.data())
def test_a_sentence_of_kept_tokens_has_the_same_tokens(original: Original, share: float, data: st.DataObject) -> None:
    """Draw a sentence that consists of kept tokens only."""
    path, before = original
    result, after = pruned(path, share)
    kept = set(result.kept_ids.tolist())
    words = [word for word in WORDS if set(before.encode(word, add_special_tokens=False).ids) <= kept]
    text = " ".join(data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=8))) if words else ""
    old = before.encode(text, add_special_tokens=False).ids
    if set(old) <= kept:
        assert result.kept_ids[after.encode(text, add_special_tokens=False).ids].tolist() == old


@given(share=SHARES)
def test_the_size_is_met_and_token_texts_are_unchanged(original: Original, share: float) -> None:
    path, before = original
    result, after = pruned(path, share)
    assert total(after) == result.size == len(set(result.kept_ids.tolist()))
    assert result.kept_ids.tolist() == sorted(result.kept_ids.tolist())
    for new, old in enumerate(result.kept_ids.tolist()):
        assert after.id_to_token(new) == before.id_to_token(old)
        assert result.new_id(old) == new
    dropped = set(range(total(before))) - set(result.kept_ids.tolist())
    assert all(result.new_id(old) is None for old in dropped)


@given(share=SHARES)
def test_added_tokens_map_to_themselves(original: Original, share: float) -> None:
    path, before = original
    result, after = pruned(path, share)
    added = before.get_added_tokens_decoder()
    assert added
    found = after.get_added_tokens_decoder()
    for old, token in added.items():
        new = result.new_id(old)
        assert after.encode(token.content, add_special_tokens=False).ids[-1:] == [new]
        assert found[new] == token
        assert found[new].special == token.special
        assert (found[new].lstrip, found[new].rstrip) == (token.lstrip, token.rstrip)
        assert (found[new].single_word, found[new].normalized) == (token.single_word, token.normalized)


@given(required=st.sets(st.integers(0, 330), max_size=20))
def test_required_tokens_are_kept(original: Original, required: set[int]) -> None:
    path, before = original
    rows = total(before)
    wanted = {token for token in required if token < rows}
    size = least(path, rows, wanted)
    result = prune_vocabulary(path, DOMAIN, size, model_vocab_size=rows, required=wanted)
    assert result.size == size
    assert wanted <= set(result.kept_ids.tolist())


@given(share=SHARES)
def test_a_larger_size_never_makes_the_domains_text_longer(original: Original, share: float) -> None:
    """A larger size never makes the domain's text longer."""
    path, _ = original
    sizes = [pruned(path, other)[0] for other in (0.0, share, 1.0)]
    lengths = [result.tokens_after for result in sizes]
    assert lengths == sorted(lengths, reverse=True)
    assert sizes[-1].tokens_after == sizes[-1].tokens_before == sizes[0].tokens_before


@given(data=st.data(), ordered=st.booleans(), chunk=st.sampled_from([1, 7, 1024]))
def test_kept_rows_equal_the_old_ones(checkpoint: Checkpoint, data: st.DataObject, ordered: bool, chunk: int) -> None:
    name, norm = "model.embed_tokens.weight", "model.norm.weight"
    whole = checkpoint.tensor(name, (331, 64))
    chosen = data.draw(st.lists(st.integers(0, 330), min_size=1, max_size=60, unique=True))
    kept = np.array(sorted(chosen) if ordered else chosen)
    source = PrunedWeights(checkpoint, kept, 331, {name}, chunk)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(kept))] * 2)))
    np.testing.assert_array_equal(source.tensor(name, (len(kept), 64)), whole[kept])
    found = source.tensor(name, (len(kept), 64), slice(start, stop))
    np.testing.assert_array_equal(found, whole[kept[start:stop]])
    np.testing.assert_array_equal(source.tensor(norm, (64,)), checkpoint.tensor(norm, (64,)))


def test_kept_rows_of_another_shape_are_refused(checkpoint: Checkpoint) -> None:
    name = "model.embed_tokens.weight"
    for rows, columns in ((330, 64), (331, 63)):
        with pytest.raises(CheckpointError, match=r"\[331, 64\]"):
            PrunedWeights(checkpoint, np.arange(9), rows, {name}).tensor(name, (9, columns))
