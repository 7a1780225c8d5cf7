"""Tokenizers from the metadata of GGUF files, against a plain tokenizer of the same rules and known answers."""

from __future__ import annotations

import heapq
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from edgelm_export.checkpoint import open_checkpoint
from edgelm_export.checkpoint.gguf_file import GgufMetadata
from edgelm_export.checkpoint.gguf_tokenizer import PRE_TOKENIZERS, read_gguf_tokenizer
from gguf_files import TYPES
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from edgelm.errors import CheckpointError

NORMAL, CONTROL, USER, UNUSED, BYTE = 1, TYPES["control"], TYPES["user"], TYPES["unused"], TYPES["byte"]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (rf"{WORDS}|\p{{N}}{{1,3}}|{REST}",),
    "smaug-bpe": (rf"{WORDS}|\p{{N}}{{1,3}}|{REST}",),
    "qwen2": (rf"{WORDS}|\p{{N}}|{REST}",),
    "gpt-4o": (rf"{CASED[0]}{SUFFIX}|{CASED[1]}{SUFFIX}|\p{{N}}{{1,3}}|{CASED_REST}",),
    "tekken": (rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{CASED_REST}",),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
"""One kind of each way to split text."""

TEXTS = [
    "",
    " ",
    "   ",
    "Hello world",
    "  Hello,  WORLD!! it's I'LL we'd  o'clock",
    "3 33 333 3333 33333 ½ ²³ ٣٤",
    "a\n\nb \n c\r\n\td\n ",
    "trailing   ",
    "Größe naïve Ünïcode ÀÉ東京 한국어 привет МИР",
    "🙂👨‍👩‍👧 e\u0301 ﬁ",
    "def f(x):\n    return x**2  # comment\n\n\n",
    "camelCase HTTPServer snake_case x/y\n/z </s> <tag>",
    "$100 + 20% = ~120^2 | `code`",
    "你好，世界。1234年 ﾃｽﾄ",
]

WRITTEN = st.text(
    st.one_of(
        st.sampled_from(" \n\r\t'.,!?/$#<>|_-0123456789aeSTstdlmRV你好é½٣𝟘Àß🙂\u0301\u00a0\u3000"),
        st.characters(codec="utf-8", exclude_characters="\u017f\u212a"),  # fold to s and k, which llama.cpp leaves out
    ),
    max_size=30,
)


@cache
def alphabet():
    """Letter of each byte, by byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters, extra = {byte: chr(byte) for byte in visible}, 0
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + extra)
            extra += 1
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [letters[byte] for byte in range(256)]


@cache
def byte_level(pre="gpt-2"):
    """Metadata of a byte-level tokenizer whose merges make words and numbers of frequent pairs."""
    letters = alphabet()

    def spell(text):
        return [letters[byte] for byte in text.encode()]

    tokens = list(letters)
    merges, known = [], set(letters)
    for word in (
        "'s",
        " the",
        "he",
        "world",
        "Hello",
        " Hello",
        "33",
        "333",
        "ll",
        "  ",
        "\n\n",
        "é",
        "你好",
        "it",
        "IL",
    ):
        parts = spell(word)
        while len(parts) > 1:
            left, right, *rest = parts
            if left + right not in known:
                merges.append((left, right))
                known.add(left + right)
                tokens.append(left + right)
            parts = [left + right, *rest]
    whole = "".join(spell("unreachable"))  # made by no merge
    tokens += [whole, "<|end|>", "<user>", "[PAD]", "<|bos|>"]
    types = [NORMAL] * (len(tokens) - 4) + [CONTROL, USER, UNUSED, CONTROL]
    return {
        "tokenizer.ggml.model": b"gpt2",
        "tokenizer.ggml.pre": pre.encode(),
        "tokenizer.ggml.tokens": [text.encode() for text in tokens],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.merges": [" ".join(merge).encode() for merge in merges],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 4,
    }


def read(values):
    return read_gguf_tokenizer(GgufMetadata(Path("model.gguf"), values))


def inner(values):
    return tokenizers.Tokenizer.from_str(read(values).tokenizer_text)


# --- byte-level BPE ---


def pieces(text, patterns):
    """Split by each pattern in turn; the text between matches is a piece too."""
    parts = [text]
    for pattern in patterns:
        parts = [part for old in parts for part in isolated(old, pattern)]
    return parts


def isolated(text, pattern):
    at = 0
    for match in regex.finditer(pattern, text):
        if match.start() > at:
            yield text[at : match.start()]
        if match.end() > match.start():
            yield match.group()
        at = match.end()
    if at < len(text):
        yield text[at:]


def merged(word, ranks):
    """Merge the pair of the lowest rank, the leftmost of equals, until none is left."""
    parts = list(word)
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(parts)))
        if rank == len(ranks):
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def plainly(text, values, pre, ignore_merges):
    tokens = [token.decode() for token in values["tokenizer.ggml.tokens"]]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.decode().split(" ")) for merge in values["tokenizer.ggml.merges"]]
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    found = []
    for piece in pieces(text, PATTERNS[pre]):
        word = "".join(alphabet()[byte] for byte in piece.encode())
        found += [word] if ignore_merges and word in ids else merged(word, ranks)
    return [ids[part] for part in found]


IGNORES = {"llama-bpe", "tekken"}


@pytest.mark.parametrize("pre", PATTERNS)
def test_every_way_to_split_gives_the_tokens_of_a_plain_tokenizer(pre):
    values, made = byte_level(pre), inner(byte_level(pre))
    for text in TEXTS:
        found = made.encode(text, add_special_tokens=False).ids
        assert found == plainly(text, values, pre, pre in IGNORES), text
        assert made.decode(found) == text


@pytest.mark.parametrize("pre", PATTERNS)
@given(text=WRITTEN)
def test_any_text_gives_the_tokens_of_a_plain_tokenizer(pre, text):
    values = byte_level(pre)
    found = made(pre).encode(text, add_special_tokens=False).ids
    assert found == plainly(text, values, pre, pre in IGNORES)
    assert made(pre).decode(found) == text


@cache
def made(pre):
    return inner(byte_level(pre))


def test_every_kind_splits_like_one_that_is_tested():
    tested = {PRE_TOKENIZERS[pre].patterns for pre in PATTERNS}
    assert {splitting.patterns for splitting in PRE_TOKENIZERS.values()} == tested


@pytest.mark.parametrize(
    ("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("smaug-bpe", False), ("qwen2", False)]
)
def test_a_piece_that_is_a_token_stays_whole_where_the_kind_says_so(pre, whole):
    found = made(pre).encode("unreachable", add_special_tokens=False).tokens
    assert (found == ["unreachable"]) == whole


def test_a_file_without_a_kind_has_the_default():
    values = {**byte_level("default")}
    del values["tokenizer.ggml.pre"]
    assert json.loads(read(values).tokenizer_text) == json.loads(read(byte_level("default")).tokenizer_text)


# --- special tokens ---


def test_special_tokens_are_found_in_text():
    values = byte_level("qwen2")
    tokens = [token.decode() for token in values["tokenizer.ggml.tokens"]]
    tokenizer = inner(values)
    found = tokenizer.encode("a<|end|>b<user>c[PAD]", add_special_tokens=False).tokens
    assert found == ["a", "<|end|>", "b", "<user>", "c", "[", "P", "A", "D", "]"]
    ids = tokenizer.encode("a<|end|>b<user>", add_special_tokens=False).ids
    assert tokenizer.decode(ids) == "ab<user>"  # control tokens are not decoded
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|end|>b<user>"
    assert tokenizer.token_to_id("[PAD]") == tokens.index("[PAD]")


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe"])
@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
def test_bos_and_eos_are_added_where_the_file_or_the_kind_says_so(pre, add_bos, add_eos):
    values = dict(byte_level(pre))
    for name, flag in (("bos", add_bos), ("eos", add_eos)):
        if flag is not None:
            values[f"tokenizer.ggml.add_{name}_token"] = flag
    bos = (pre == "llama-bpe") if add_bos is None else add_bos
    expected = ["<|bos|>"] * bos + ["a"] + ["<|end|>"] * bool(add_eos)
    assert inner(values).encode("a").tokens == expected
    assert inner(values).encode("a", add_special_tokens=False).tokens == ["a"]


def test_the_tokens_that_end_an_answer():
    values = dict(byte_level())
    count = len(values["tokenizer.ggml.tokens"])
    assert list(read(values).end_ids) == [count - 4]
    values["tokenizer.ggml.eot_token_id"] = count - 2
    values["tokenizer.ggml.eom_token_id"] = count - 3
    found = read(values)
    assert list(found.end_ids) == [count - 4, count - 2, count - 3]
    assert found.control.keys() == {"<|end|>", "<user>", "[PAD]", "<|bos|>"}
    del values["tokenizer.ggml.eos_token_id"]
    assert list(read(values).end_ids) == [count - 2, count - 3, count - 4]  # <|end|> by its name


def test_an_ordinary_token_spelled_like_an_end_token_is_not_one():
    values = dict(byte_level())
    values["tokenizer.ggml.tokens"] = [*values["tokenizer.ggml.tokens"], b"</s>"]
    values["tokenizer.ggml.token_type"] = np.append(values["tokenizer.ggml.token_type"], NORMAL)
    assert len(read(values).end_ids) == 1


def test_ids_out_of_range_are_ignored():
    values = {**byte_level(), "tokenizer.ggml.padding_token_id": 2**32 - 1, "tokenizer.ggml.unknown_token_id": 10**6}
    found = read(values)
    assert found.pad is None
    assert found.config.keys() == {"bos_token", "eos_token"}


# --- SentencePiece ---


@cache
def sentencepiece():
    """Metadata of a SentencePiece tokenizer: bytes, letters, and pieces with a score each."""
    generator = np.random.default_rng(0)
    words = ["▁the", "▁hello", "ello", "hell", "▁a", "orld", "▁world", "er", "▁▁", "▁▁▁▁", "ab", "bab", "aba", "lo▁w"]
    parts = sorted(
        {word[i:j] for word in words for i in range(len(word)) for j in range(i + 2, len(word) + 1)} | set(words)
    )
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz", "▁", "é", "你"})
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *parts,
        *letters,
        "<|user|>",
        "[PAD]",
    ]
    types = [2, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(parts) + len(letters)), USER, UNUSED]
    scores = [0.0] * 259 + [-float(rank) for rank in generator.permutation(len(parts))]
    return {
        "tokenizer.ggml.model": b"llama",
        "tokenizer.ggml.tokens": [text.encode() for text in tokens],
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores + [-1000.0] * (len(tokens) - len(scores)), np.float32),
        "tokenizer.ggml.add_bos_token": True,
    }


def by_score(text, values):
    """Merge the neighbours that make the piece with the highest score, the leftmost of equals; then spell bytes."""
    tokens = [token.decode() for token in values["tokenizer.ggml.tokens"]]
    scores = dict(zip(tokens, values["tokenizer.ggml.scores"].tolist(), strict=True))
    ids = {token: i for i, token in enumerate(tokens)}
    symbols = dict(enumerate(text.replace(" ", "▁")))
    following, before = {i: i + 1 for i in symbols}, {i: i - 1 for i in symbols}
    queue = []

    def consider(left, right):
        if left in symbols and right in symbols and symbols[left] + symbols[right] in ids:
            piece = symbols[left] + symbols[right]
            heapq.heappush(queue, (-scores[piece], left, right, piece))

    for i in range(1, len(symbols)):
        consider(i - 1, i)
    while queue:
        _, left, right, piece = heapq.heappop(queue)
        if (
            left in symbols
            and right in symbols
            and following[left] == right
            and symbols[left] + symbols[right] == piece
        ):
            symbols[left] = piece
            del symbols[right]
            following[left] = following[right]
            before[following[right]] = left
            consider(before[left], left)
            consider(left, following[left])
    found = []
    for i in sorted(symbols):
        spelled = [f"<0x{byte:02X}>" for byte in symbols[i].encode()]
        found += [ids[part] for part in ([symbols[i]] if symbols[i] in ids else spelled)]
    return found


SPOKEN = st.text(st.sampled_from("the hello world ab  baé你zß🙂\n"), max_size=40)


@pytest.mark.parametrize("prefix", [True, False])
@given(text=SPOKEN)
def test_pieces_are_merged_by_their_scores(prefix, text):
    values = {**sentencepiece(), "tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = spoken(prefix)
    expected = by_score(" " + text if prefix and text else text, values)
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert tokenizer.decode(expected) == text
    assert tokenizer.encode(text).ids == [1, *expected]


@cache
def spoken(prefix):
    return inner({**sentencepiece(), "tokenizer.ggml.add_space_prefix": prefix})


def test_sentencepieces_special_tokens_have_ids_by_default():
    found = read(sentencepiece())
    assert (found.bos, found.pad, list(found.end_ids)) == (1, None, [2])
    assert found.config == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert spoken(True).encode("<s>ab</s><|user|>ab").tokens == ["<s>", "<s>", "▁", "ab", "</s>", "<|user|>", "▁", "ab"]


def test_phi_3s_tokens_strip_the_spaces_after_them():
    values = {**sentencepiece(), "general.name": b"Phi-3 mini", "tokenizer.ggml.add_space_prefix": False}
    tokenizer = inner(values)

    def spelled(text):
        return [tokenizer.id_to_token(token) for token in tokenizer.encode(text, add_special_tokens=False).ids]

    assert spelled("<|user|>  ab") == ["<|user|>", "ab"]
    assert spelled("<s> ab") == ["<s>", "▁", "ab"]


# --- a real model ---

REAL = [
    ("hello", [28120]),
    ("Hello world", [19556, 905]),
    ("The year 1984, isn't it?", [504, 713, 216, 33, 41, 40, 36, 28, 3247, 982, 357, 47]),
    ("  two  spaces\n\n\ttab", [216, 827, 216, 5600, 1116, 197, 15999]),
    ("naïve café 東京 🙂", [3546, 46494, 37366, 17097, 247, 126, 16736, 122, 47526]),
    (
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],
    ),
    (
        "def f(x):\n    return x ** 2 # 12.5%",
        [1604, 275, 24, 104, 727, 472, 1003, 1792, 1903, 216, 34, 907, 216, 33, 34, 30, 37, 21],
    ),
]
"""Tokens of llama.cpp for some texts, with bos and special tokens (SmolLM2, which adds no bos)."""


def test_the_real_models_tokens_equal_those_of_llama_cpp(smollm2_gguf):
    tokenizer = tokenizers.Tokenizer.from_str(open_checkpoint(smollm2_gguf).tokenizer_text)
    for text, expected in REAL:
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == text


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": b"bert"}, "'bert'.*gpt2.*llama"),
        ({"tokenizer.ggml.model": b"no_vocab"}, "'no_vocab'"),
        ({"tokenizer.ggml.pre": b"poro-chat"}, "'poro-chat'.*qwen2.*smollm"),
        ({"tokenizer.ggml.tokens": [b"a", b"a"]}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [b"\xff"]}, "tokenizer.ggml.tokens.*UTF-8"),
        ({"tokenizer.ggml.tokens": b"text"}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": [b"x y"]}, "merges"),
        ({"tokenizer.ggml.merges": [b"nothing"]}, "merges"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": np.array([1])}, r"tokenizer.ggml.token_type.* \d+"),
        ({"tokenizer.ggml.eos_token_id": b"</s>"}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.eos_token_id": np.array([1, 2])}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template"),
        ({"tokenizer.chat_template": b"\xff"}, "tokenizer.chat_template.*UTF-8"),
        ({"tokenizer.ggml.add_bos_token": 1}, "tokenizer.ggml.add_bos_token"),
    ],
    ids=str,
)
def test_a_bad_tokenizer_is_refused_by_key(changes, message):
    values = {key: value for key, value in {**byte_level(), **changes}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        read(values)


@pytest.mark.parametrize("scores", [None, [1.0], [float("nan")] * 338, b"x"], ids=["none", "few", "nan", "text"])
def test_sentencepiece_needs_scores(scores):
    values = dict(sentencepiece())
    assert len(values["tokenizer.ggml.tokens"]) == 338
    del values["tokenizer.ggml.scores"]
    if scores is not None:
        values["tokenizer.ggml.scores"] = np.array(scores) if isinstance(scores, list) else scores
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.scores"):
        read(values)
