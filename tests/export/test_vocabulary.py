"""Pruning: which tokens are kept first, and the new tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from prunable_tokenizers import BYTES, DOMAIN, tokenizer_json, write
from tokenizers import decoders, models, pre_tokenizers

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

from edgelm_export.vocabulary import PrunedVocabulary, prune_vocabulary
from edgelm_export.vocabulary.pruning import CHUNK

LETTERS = pre_tokenizers.ByteLevel.alphabet()
ALL = 10_000


def byte_level(merges: list[tuple[str, str]], letters: list[str] = LETTERS, **options: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE with these merges, without splitting."""
    names = [*options.pop("first", ()), *sorted(letters), *("".join(pair) for pair in merges)]
    vocab = {name: token for token, name in enumerate(dict.fromkeys(names))}
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def names(result: PrunedVocabulary) -> set[str]:
    return set(tokenizers.Tokenizer.from_str(result.tokenizer_text).get_vocab())


def test_the_most_applied_merges_stay(tmp_path: Path) -> None:
    made = byte_level([("a", "b"), ("c", "d"), ("e", "f"), ("ef", "g"), ("efg", "h"), ("x", "y")])
    text = "ab" * 3 + "cd" * 5 + "efgh" * 20 + "efg" * 10 + "z" * 100
    path = write(tmp_path, made)
    for size, expected in (
        (257, {"ef"}),
        (258, {"ef", "efg"}),
        (259, {"ef", "efg", "efgh"}),
        (260, {"ef", "efg", "efgh", "cd"}),
        (261, {"ef", "efg", "efgh", "cd", "ab"}),
    ):
        result = prune_vocabulary(path, text, size, model_vocab_size=262)
        assert names(result) - set(LETTERS) == expected
    assert result.tokens_before == result.tokens_after == 3 + 5 + 20 + 10 + 100
    assert prune_vocabulary(path, text, 256, model_vocab_size=262).tokens_after == len(text)


def test_the_earliest_merges_fill_the_rest_of_the_size(tmp_path: Path) -> None:
    made = byte_level([("q", "r"), ("a", "b"), ("qr", "s"), ("t", "u")], first=["tu"])
    path = write(tmp_path, made)
    assert names(prune_vocabulary(path, "ab" * 200, 258, model_vocab_size=ALL)) - set(LETTERS) == {"ab", "qr"}
    assert names(prune_vocabulary(path, "ab" * 200, 259, model_vocab_size=ALL)) - set(LETTERS) == {"ab", "qr", "qrs"}


def test_a_character_outweighs_a_merge(tmp_path: Path) -> None:
    """Bytes can spell it too, but the model has rarely seen them."""
    vocab = {name: token for token, name in enumerate([*BYTES, "t", "h", "e", "th", "the", "ñ"])}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    result = prune_vocabulary(write(tmp_path, made), "the" * 200 + "ñ" * 60, 260, model_vocab_size=ALL)
    assert names(result) - set(BYTES) == {"t", "h", "e", "ñ"}
    assert (result.tokens_lost, result.sufficient_size) == (200, 262)


def test_a_filling_token_is_kept_with_its_components(tmp_path: Path) -> None:
    """The list has `abc` before its part `bc`; without `bc` no text would be encoded as `abc`."""
    made = byte_level([("a", "bc"), ("x", "y"), ("b", "c")])
    assert names(prune_vocabulary(write(tmp_path, made), "z" * 200, 257, model_vocab_size=ALL)) - set(LETTERS) == {"xy"}
    assert names(prune_vocabulary(write(tmp_path, made), "z" * 200, 258, model_vocab_size=ALL)) - set(LETTERS) == {
        "abc",
        "bc",
    }


def test_equal_pairs_join_from_the_left(tmp_path: Path) -> None:
    """`aaa` is made of `aa`, `a`; merged from the right it would not be made, and seem to need no other token."""
    made = byte_level([("x", "y"), ("a", "a"), ("aa", "a")])
    result = prune_vocabulary(write(tmp_path, made), "aaa." * 100, 257, model_vocab_size=ALL)
    assert names(result) - set(LETTERS) == {"aa"}


def test_a_word_found_whole_needs_no_merges(tmp_path: Path) -> None:
    made = byte_level([("k", "i")], first=["kitchen"], ignore_merges=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), made.pre_tokenizer])
    result = prune_vocabulary(write(tmp_path, made), "kitchen " * 200, 257, model_vocab_size=ALL)
    after = tokenizers.Tokenizer.from_str(result.tokenizer_text)
    assert names(result) - set(LETTERS) == {"kitchen"}
    assert after.encode("kitchen").ids == [result.new_id(0)]


def test_the_unknown_token_stays(tmp_path: Path) -> None:
    """A vocabulary trained without an initial alphabet lacks bytes; its unknown token stands for them."""
    made = byte_level([("a", "b"), ("c", "d")], list("abcd"), first=["ab", "cd", "<unk>"], unk_token="<unk>")
    result = prune_vocabulary(write(tmp_path, made), "abcd" * 100, 6, model_vocab_size=ALL)
    before, after = made.encode("abxcd"), tokenizers.Tokenizer.from_str(result.tokenizer_text).encode("abxcd")
    assert before.tokens == ["ab", "<unk>", "cd"]
    assert after.tokens == ["ab", "<unk>", "c", "d"]


def test_the_score_of_an_unknown_character_is_unchanged(tmp_path: Path) -> None:
    """The penalty depends on the lowest score: without `é` in the scores, bytes would win over the text's pieces."""
    pieces = [
        ("<unk>", 0.0),
        *((name, 0.0) for name in BYTES),
        ("é", -100.0),
        ("ab", -30.0),
        ("a", -25.0),
        ("b", -20.0),
    ]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    path = write(tmp_path, made)
    for size in range(260, 262):
        after = tokenizers.Tokenizer.from_str(
            prune_vocabulary(path, "ab" * 99 + "bb" * 99, size, model_vocab_size=ALL).tokenizer_text
        )
        assert after.token_to_id("é") is not None
        assert after.decode(after.encode("abéab").ids) == "abéab"
        assert [token for token in after.encode("ab" * 2).tokens if token.startswith("<")] == []


def test_ids_change_in_all_places(tmp_path: Path) -> None:
    content = json.loads(tokenizer_json("gpt2"))
    end = content["padding"]["pad_id"]
    path = write(tmp_path, "gpt2")
    result = prune_vocabulary(path, DOMAIN, 300, model_vocab_size=ALL)
    moved = json.loads(result.tokenizer_text)
    added = {token["content"]: token["id"] for token in moved["added_tokens"]}
    assert added == {token["content"]: result.new_id(token["id"]) for token in content["added_tokens"]}
    assert moved["padding"] == {**content["padding"], "pad_id": result.new_id(end)}
    template = moved["post_processor"]["processors"][1]["special_tokens"]
    assert {name: entry["ids"] for name, entry in template.items()} == {n: [added[n]] for n in ("<s>", "<|user|>")}
    assert added["<|user|>"] == 298  # the second last: it was numbered after the model's own tokens


def test_truncation_and_the_other_processors_stay(tmp_path: Path) -> None:
    moved = json.loads(prune_vocabulary(write(tmp_path, "llama2"), DOMAIN, 300, model_vocab_size=ALL).tokenizer_text)
    before = json.loads(tokenizer_json("llama2"))
    for name in ("truncation", "normalizer", "pre_tokenizer", "decoder", "post_processor", "version"):
        assert moved[name] == before[name]
    assert before["truncation"] is not None
    assert before["post_processor"]["type"] == "RobertaProcessing"


def test_rows_without_tokens_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, "llama3")
    total = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    result = prune_vocabulary(path, DOMAIN, total, model_vocab_size=total + 271)
    assert result.kept_ids.tolist() == list(range(total))
    assert json.loads(result.tokenizer_text)["model"] == json.loads(path.read_text("utf-8"))["model"]


def test_added_tokens_without_a_row_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, "llama3")
    before = tokenizers.Tokenizer.from_file(str(path))
    reserved = before.token_to_id("<|reserved|>")
    result = prune_vocabulary(path, DOMAIN, 300, model_vocab_size=reserved)
    after = tokenizers.Tokenizer.from_str(result.tokenizer_text)
    assert after.token_to_id("<|reserved|>") is None
    assert result.new_id(before.token_to_id("<|eot|>")) == 299
    assert after.decode(after.encode("<|reserved|>").ids) == "<|reserved|>"


def test_tokens_numbered_out_of_order(tmp_path: Path) -> None:
    made = json.loads(byte_level([("a", "b"), ("ab", "c")]).to_str())
    made["model"]["vocab"]["abc"] = 400
    made["added_tokens"] = [
        {"id": 258, "content": "<s>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]
    result = prune_vocabulary(write(tmp_path, made), "abc" * 200, 259, model_vocab_size=401)
    after = tokenizers.Tokenizer.from_str(result.tokenizer_text)
    assert result.kept_ids[-3:].tolist() == [256, 400, 258]
    assert result.kept_ids[after.encode("abc<s>").ids].tolist() == [400, 258]


def test_long_texts_are_counted_in_parts(tmp_path: Path) -> None:
    path = write(tmp_path, "gpt2")
    text = (DOMAIN + "\n") * (3 * CHUNK // len(DOMAIN))
    before = tokenizers.Tokenizer.from_file(str(path))
    assert prune_vocabulary(path, text, 400, model_vocab_size=ALL).tokens_before == len(
        before.encode(text, add_special_tokens=False).ids
    )


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, "unigram")
    first, second = (prune_vocabulary(path, DOMAIN, 300, model_vocab_size=ALL) for _ in range(2))
    assert first.tokenizer_text == second.tokenizer_text
    assert first.kept_ids.tolist() == second.kept_ids.tolist()


def test_a_real_vocabulary_pruned_for_its_own_domain(stories_checkpoint: Path, shared: Path) -> None:
    """Two thirds of its 512 tokens are bytes and special tokens; the rest are the most used merges."""
    text = (shared / "data" / "tinystories" / "dev.txt").read_text("utf-8")[:50_000]
    path = stories_checkpoint / "tokenizer.json"
    result = prune_vocabulary(path, text, 400, model_vocab_size=512)
    assert result.size == 400
    assert result.tokens_before < result.tokens_after < 1.4 * result.tokens_before
    assert 0 < result.tokens_lost < result.tokens_before
    enough = prune_vocabulary(path, text, result.sufficient_size, model_vocab_size=512)
    assert enough.tokens_lost == 0
    assert enough.tokens_before == enough.tokens_after
    assert prune_vocabulary(path, text, result.sufficient_size - 1, model_vocab_size=512).tokens_lost > 0
    assert {"▁the", "▁and", "▁to"} <= names(result)
