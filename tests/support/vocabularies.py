"""Small trained tokenizers of the two common kinds: byte-level BPE, and BPE with byte fallback."""

from __future__ import annotations

from functools import cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from edgelm.text.tokenizer import Tokenizer

TEXTS = [
    "Once upon a time there was a little cat who played in the kitchen with a red ball.",
    "turn off the kitchen light, please! It's 20 degrees; isn't it cold?",
    'play some jazz by Miles Davis {"intent": "PlayMusic", "slots": {"artist": "Miles Davis"}}',
    "Der Bär läuft über die Straße. Où est la bibliothèque? Año nuevo, corazón.",
    "漢字漢字日本語日本語 中文中文 한국어한국어 привет мир привет мир",
    "😀😀🎉🎉👍🏽👍🏽👨‍👩‍👧‍👦 café naïve €100 → ∞",
] * 4


@cache
def byte_level() -> Tokenizer:
    """A byte-level BPE trained without splitting at words, so that tokens end inside characters."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS, trainer)
    return Tokenizer(inner)


def straddling(character: str) -> tuple[Tokenizer, list[int], int]:
    """Return a vocabulary with a token that ends one `character` and begins the next.

    Also the tokens of the character's bytes, and the token of its last byte followed by all the others.
    """
    alphabet = _byte_level_alphabet()
    spelled = [alphabet[byte] for byte in character.encode()]
    across, name, merges = [spelled[-1], *spelled[:-1]], spelled[-1], []
    vocabulary = {letter: byte for byte, letter in enumerate(alphabet)}
    for letter in across[1:]:
        merges.append((name, letter))
        name += letter
        vocabulary[name] = len(vocabulary)
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    inner.decoder = decoders.ByteLevel()
    return Tokenizer(inner), [vocabulary[letter] for letter in spelled], vocabulary[name]


@cache
def byte_fallback() -> Tokenizer:
    """A BPE like Llama 2's: spaces are `▁`, one is added before a text, unknown characters become byte tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False, limit_alphabet=40)
    inner.train_from_iterator([text for text in TEXTS if text.isascii()], trainer)
    learned = inner.get_vocab()
    merges = [(a, b) for a in learned for b in learned if a + b in learned]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *sorted(learned, key=learned.get)]
    vocabulary = {name: token for token, name in enumerate(names)}
    merges.sort(key=lambda pair: vocabulary[pair[0] + pair[1]])
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = inner.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(made)


@cache
def bytes_of(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Return the bytes of every token from its name; special tokens have none."""
    inner = tokenizer._inner
    alphabet = {character: byte for byte, character in enumerate(_byte_level_alphabet())}
    special = {token for token, added in inner.get_added_tokens_decoder().items() if added.special}
    found = {}
    for name, token in inner.get_vocab().items():
        if token in special:
            found[token] = b""
        elif not tokenizer.byte_tokens:
            found[token] = bytes(alphabet[character] for character in name)
        elif token in tokenizer.byte_tokens:
            found[token] = bytes([int(name[3:5], 16)])
        else:
            found[token] = name.replace("▁", " ").encode()
    return found


def _byte_level_alphabet() -> list[str]:
    """Return the character of each byte: itself if printable, else the next free one from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
