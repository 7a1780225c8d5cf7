"""Converts the tokenizer in a GGUF file's metadata to a tokenizer.json.

Two models: `gpt2`, byte-level BPE with one of several ways to split text first (`tokenizer.ggml.pre`), and `llama`,
SentencePiece's BPE, whose merges follow from the pieces' scores. Kinds and defaults are those of llama.cpp
(`src/llama-vocab.cpp`), so that a text has the same tokens as in llama.cpp; if llama.cpp quotes a pattern of the
original tokenizer beside its own approximation, the original is used. As in llama.cpp, text is not normalized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from edgelm.errors import CheckpointError

from .gguf_file import GgufMetadata

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens."""

SPACE: Final = "▁"
"""SentencePiece's character for a space."""

TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED: Final = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
CASED_TAIL: Final = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTION: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizerConfig:
    """How one kind of `tokenizer.ggml.pre` splits text: by each pattern in turn, into matches and the text between.

    ignore_merges: a piece that is a token stays whole. add_bos: default if the file has no value.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_DEFAULT: Final = PreTokenizerConfig((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_GPT2: Final = PreTokenizerConfig((GPT2,))
_DIGITS: Final = PreTokenizerConfig((r"\p{N}", GPT2))
_LLAMA3: Final = (rf"{WORDS}|\p{{N}}{{1,3}}|{TAIL}",)
_QWEN2: Final = PreTokenizerConfig((rf"{WORDS}|\p{{N}}|{TAIL}",))
_GPT4O: Final = PreTokenizerConfig((rf"{CASED[0]}{CONTRACTION}|{CASED[1]}{CONTRACTION}|\p{{N}}{{1,3}}|{CASED_TAIL}",))
_TEKKEN: Final = PreTokenizerConfig((rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{CASED_TAIL}",), ignore_merges=True, add_bos=True)
_DEEPSEEK_CODER: Final = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")

PRE_TOKENIZERS: Final[dict[str, PreTokenizerConfig]] = {
    "default": _DEFAULT,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4", "trillion", "granite-docling", "mellum"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"),
        PreTokenizerConfig(_LLAMA3, ignore_merges=True, add_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), PreTokenizerConfig(_LLAMA3)),
    "glm4": PreTokenizerConfig(_LLAMA3, ignore_merges=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    "tekken": _TEKKEN,
    "deepseek-coder": PreTokenizerConfig(_DEEPSEEK_CODER),
}
"""Known kinds of `tokenizer.ggml.pre`; several names may have the same patterns."""

SPECIAL_TOKEN_KEYS: Final = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "eot": "tokenizer.ggml.eot_token_id",
    "eom": "tokenizer.ggml.eom_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}

SENTENCEPIECE_IDS: Final = {
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
"""Default ids of a `llama` tokenizer."""

END_TEXTS: Final = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
        *("</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>"),
    }
)
"""Tokens that end an answer even if the metadata, which often names only one of several, does not list them. Not if
they are ordinary tokens: Qwen has an HTML tag `</s>`."""


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """The tokenizer in the metadata.

    tokenizer_text: the tokenizer.json. config: special tokens and chat template, as in tokenizer_config.json. bos, pad:
    their ids. end_ids: the ids that end an answer, the file's own eos first. control: the ids of control tokens by
    text.
    """

    tokenizer_text: str
    config: Mapping[str, Any]
    bos: int | None
    pad: int | None
    end_ids: Sequence[int]
    control: Mapping[str, int]


def read_gguf_tokenizer(metadata: GgufMetadata) -> GgufTokenizer:
    """Read the tokenizer of a file.

    Raises `CheckpointError` for an unknown model or kind of splitting, and for tokens, scores, types and merges that do
    not fit each other.
    """
    model = metadata.text("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise CheckpointError(f"{metadata.path}: tokenizer {model[:80]!r} is not supported; supported: gpt2, llama")
    tokens = _tokens(metadata)
    types = _types(metadata, tokens)
    ids = {name: _special(metadata, key, len(tokens), model) for name, key in SPECIAL_TOKEN_KEYS.items()}
    named = (i for i, text in enumerate(tokens) if text in END_TEXTS and types[i] != NORMAL)
    ends = [*(ids[name] for name in ("eos", "eot", "eom")), *named]
    for token in (ids["bos"], *ends):
        if token is not None:
            types[token] = CONTROL
    inner, add_bos = _byte_level(metadata, tokens) if model == "gpt2" else _sentencepiece(metadata, tokens, types, ids)
    inner.add_tokens(_added(metadata, tokens, types))
    if [inner.token_to_id(text) for text in tokens] != list(range(len(tokens))):
        raise CheckpointError(f"{metadata.path}: the tokenizers library numbers the tokens of this file differently")
    _add_special(inner, tokens, metadata, add_bos, ids)
    return GgufTokenizer(
        tokenizer_text=inner.to_str(),
        config=_config(metadata, tokens, ids),
        bos=ids["bos"],
        pad=ids["pad"],
        end_ids=[token for token in dict.fromkeys(ends) if token is not None],
        control={text: token for token, text in enumerate(tokens) if types[token] == CONTROL},
    )


def _tokens(metadata: GgufMetadata) -> list[str]:
    """Return the text of every token, all different. A token without text gets llama.cpp's name for it."""
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(metadata.texts("tokenizer.ggml.tokens"))]
    if not tokens or len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{metadata.path}: tokenizer.ggml.tokens must be a list of different tokens, not empty")
    return tokens


def _types(metadata: GgufMetadata, tokens: Sequence[str]) -> list[int]:
    key = "tokenizer.ggml.token_type"
    if not metadata.has_key(key):
        return [NORMAL] * len(tokens)
    return [int(kind) for kind in metadata.numbers(key, len(tokens))]


def _special(metadata: GgufMetadata, key: str, count: int, model: str) -> int | None:
    """Return a special token's id; None if it is missing or out of range, as -1 often is."""
    value = metadata.values.get(key, SENTENCEPIECE_IDS.get(key) if model == "llama" else None)
    if isinstance(value, bool) or not isinstance(value, int):
        if value is not None:
            raise CheckpointError(f"{metadata.path}: {key} must be a token's id, got {str(value)[:80]}")
        return None
    return value if 0 <= value < count else None


def _byte_level(metadata: GgufMetadata, tokens: Sequence[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """Build a byte-level BPE; also return the default of adding bos."""
    kind = metadata.text("tokenizer.ggml.pre", "default")
    if kind not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.pre {kind[:80]!r} is not supported;"
            f" supported: {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    splitting = PRE_TOKENIZERS[kind]
    merges = []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        at = merge.find(" ", 1)  # the first part may itself start with a space
        merges.append((merge[:at], merge[at + 1 :]))
    inner = _bpe(metadata, tokens, merges, ignore_merges=splitting.ignore_merges)
    *before, last = splitting.patterns
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == r"\p{N}"
        else pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in (before if last == GPT2 else splitting.patterns)
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=last == GPT2))
    inner.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    return inner, splitting.add_bos


def _sentencepiece(
    metadata: GgufMetadata, tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int | None]
) -> tuple[tokenizers.Tokenizer, bool]:
    """Build SentencePiece's BPE (Kudo & Richardson 2018, arXiv:1808.06226): pieces with higher scores are made first.

    A piece may be made of any two others, so each way to cut it gives a merge. Control and unused tokens are not made.
    """
    scores = metadata.numbers("tokenizer.ggml.scores", len(tokens))
    made = {text: i for i, text in enumerate(tokens) if types[i] in (NORMAL, USER_DEFINED)}
    merges: list[tuple[str, str]] = []
    for i in sorted(made.values(), key=lambda i: (-scores[i], i)):
        text = tokens[i]
        cuts = ((text[:at], text[at:]) for at in range(1, len(text)))
        merges += sorted((cut for cut in cuts if cut[0] in made and cut[1] in made), key=lambda cut: made[cut[0]])
    unknown = None if ids["unk"] is None else tokens[ids["unk"]]
    spells = {f"<0x{byte:02X}>" for byte in range(256)} <= set(tokens)
    inner = _bpe(metadata, tokens, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spells)
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return inner, True


def _bpe(
    metadata: GgufMetadata, tokens: Sequence[str], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(tokens)}, merges, **options))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{metadata.path}: merges do not fit the tokens: {error}") from error


def _added(metadata: GgufMetadata, tokens: Sequence[str], types: Sequence[int]) -> list[tokenizers.AddedToken]:
    """Return the tokens that are matched in text before anything else."""
    # the file does not store which tokens strip the spaces after them; like llama.cpp, detect Phi 3 by its name
    phi3 = any(name in metadata.text("general.name", "").lower() for name in ("phi-3", "phi3"))
    strips = phi3 and metadata.text("tokenizer.ggml.model") == "llama"
    return [
        tokenizers.AddedToken(
            text,
            special=kind != USER_DEFINED,
            normalized=False,
            rstrip=strips and text not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for text, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]


def _add_special(
    inner: tokenizers.Tokenizer,
    tokens: Sequence[str],
    metadata: GgufMetadata,
    add_bos: bool,
    ids: Mapping[str, int | None],
) -> None:
    """Make encoding add bos and eos as the file requires."""
    wanted = {
        "bos": metadata.flag("tokenizer.ggml.add_bos_token", add_bos),
        "eos": metadata.flag("tokenizer.ggml.add_eos_token", False),
    }
    found = {name: token for name in wanted if wanted[name] and (token := ids[name]) is not None}
    if found:
        special = [(tokens[token], token) for token in dict.fromkeys(found.values())]
        around = {name: [f"{tokens[token]}:0"] for name, token in found.items()}
        inner.post_processor = processors.TemplateProcessing(
            single=[*around.get("bos", []), "$A:0", *around.get("eos", [])],
            special_tokens=special,
        )


def _config(metadata: GgufMetadata, tokens: Sequence[str], ids: Mapping[str, int | None]) -> dict[str, Any]:
    """Return special tokens and chat template in the form of tokenizer_config.json."""
    config: dict[str, Any] = {
        f"{name}_token": tokens[token] for name in ("bos", "eos", "unk", "pad") if (token := ids[name]) is not None
    }
    if metadata.has_key("tokenizer.chat_template"):
        config["chat_template"] = metadata.text("tokenizer.chat_template")
    return config
