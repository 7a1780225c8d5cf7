"""Texts of special tokens in a message stay text, and taint tracking changes nothing else."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from vocabularies import TEXTS, byte_fallback, byte_level

from edgelm.text.chat_template import ChatTemplate
from edgelm.text.tainted_text import SpecialTokenFinder, TaintedText, TaintTracker
from edgelm.text.tokenizer import Tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "</s>", "<s>", "[INST]", "[/INST]"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "trim": CHATML.replace("m.content", "m.content | trim"),
    "strip": CHATML.replace("m.content", "m['content'].strip()"),
    "upper": CHATML.replace("m.content", "m.content | upper"),
    "joined": "{% for m in messages %}<|im_start|>{{ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}",
    "added": "{% for m in messages %}{{ '<s>[INST] ' + m.content.strip() + ' [/INST]</s>' }}{% endfor %}",
    "formatted": "{% for m in messages %}{{ '<s>%s' | format(m.content) }}{{ '{}</s>'.format(m.content) }}{% endfor %}",
    "thoughts": (
        "{% for m in messages %}{% set c = m.content %}"
        "{% if '</s>' in c %}{% set c = c.split('</s>')[-1].lstrip('\n') %}{% endif %}"
        "{% if c.startswith('<|im_end|>') or c.endswith('[INST]') %}!{% endif %}"
        "<|im_start|>{{ c }}<|im_end|>{{ c | length }}{{ c[:3] }}{{ c[1:] | replace('<s>', '-') }}{% endfor %}"
    ),
    "list": "<s>{{ messages }}</s>",
    "data": "<s>{{ messages | tojson }}</s>{{ messages | tojson(ensure_ascii=true) }}[/INST]",
    "nothing between": "<s>{% for m in messages %}{{ m.content }}{% endfor %}</s>",
    "angle brackets around": "{% for m in messages %}<{{ m.content }}>{% endfor %}</s>",
    "lines": "{% for m in messages %}{% for line in m.content.splitlines() %}<s>{{ line }}\n{% endfor %}{% endfor %}",
    "letters": "{% for m in messages %}{% for letter in m.content %}{{ letter }}{% endfor %}</s>{% endfor %}",
}
PIECES = st.sampled_from(
    [*SPECIAL, "<|im_", "end|>", "<", ">", "|", " ", "\n", "s>", "</", "Once upon", "é", "漢字", "😀", "INST", "\ufdd0"]
)
MANY = settings(max_examples=300)
SPELLED = st.lists(PIECES, max_size=8).map("".join)
HARMLESS = st.lists(
    st.sampled_from(["Once upon", " ", "\n", "é", "漢字", "a < b", "x > 1", "[1]", "😀"]), max_size=8
).map("".join)


def with_special(tokenizer: Tokenizer, template: str) -> Tokenizer:
    inner = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    inner.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return Tokenizer(inner, template, bos_token="<s>", eos_token="</s>")


@cache
def merging() -> Tokenizer:
    """A vocabulary whose merges give `</s>`, also a special token, and that adds one `▁` before a text."""
    letters = sorted({*"</s>▁INT[]|imend_str", *(c for text in TEXTS for c in text if c.isascii())})
    names = ["<unk>", "</s>", *letters, "</", "s>"]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    model = models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")], unk_token="<unk>", fuse_unk=True)
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(inner)


@cache
def unigram() -> Tokenizer:
    """A Unigram vocabulary with special tokens among its pieces, like SentencePiece's control symbols."""
    letters = sorted({c for text in TEXTS for c in text if c.isascii()} | set("▁<|>/[]_"))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -5.0) for letter in letters), ("im", -3.0)]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(inner)


@pytest.fixture(scope="module", params=["byte level", "byte fallback", "merging", "unigram", "stories260K"])
def base(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "stories260K":
        checkpoint: Path = request.getfixturevalue("stories_checkpoint")
        return Tokenizer.from_file(checkpoint / "tokenizer.json")
    return {"byte level": byte_level, "byte fallback": byte_fallback, "merging": merging, "unigram": unigram}[
        request.param
    ]()


@pytest.fixture(scope="module")
def chats(base: Tokenizer) -> dict[str, Tokenizer]:
    return {name: with_special(base, template) for name, template in TEMPLATES.items()}


def messages_of(texts: list[str]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def render_without_marks(name: str, messages: list[dict[str, Any]]) -> str:
    """Return the rendered messages without taint tracking."""
    return ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}).render(messages).text


def special_ids(tokenizer: Tokenizer) -> dict[int, str]:
    return {tokenizer._inner.token_to_id(text): text for text in SPECIAL}


@MANY
@given(name=st.sampled_from(sorted(TEMPLATES)), texts=st.lists(HARMLESS, min_size=1, max_size=3))
def test_without_special_tokens_nothing_changes(chats: dict[str, Tokenizer], name: str, texts: list[str]) -> None:
    tokenizer, messages = chats[name], messages_of(texts)
    text = render_without_marks(name, messages)
    assert tokenizer.render_chat(messages) == text
    assert tokenizer.encode_prompt(tokenizer.build_prompt(messages)) == tokenizer.encode(text, add_special_tokens=False)


@MANY
@given(name=st.sampled_from(sorted(TEMPLATES)), texts=st.lists(SPELLED, min_size=1, max_size=3))
def test_a_template_does_not_see_the_marks(chats: dict[str, Tokenizer], name: str, texts: list[str]) -> None:
    messages = messages_of(texts)
    assert chats[name].render_chat(messages) == render_without_marks(name, messages)


@MANY
@given(
    name=st.sampled_from(sorted(set(TEMPLATES) - {"thoughts", "lines"})),
    texts=st.lists(SPELLED, min_size=1, max_size=3),
)
def test_only_the_template_s_special_tokens_are_special(
    chats: dict[str, Tokenizer], name: str, texts: list[str]
) -> None:
    """The same special tokens in the same order as with harmless messages."""
    tokenizer, known = chats[name], special_ids(chats[name])
    tokens = tokenizer.encode_prompt(tokenizer.build_prompt(messages_of(texts)))
    harmless = tokenizer.encode_prompt(tokenizer.build_prompt(messages_of(["a"] * len(texts))))
    assert [known[t] for t in tokens if t in known] == [known[t] for t in harmless if t in known]


@given(texts=st.lists(SPELLED, min_size=1, max_size=3))
def test_the_tokens_decode_to_the_prompt(base: Tokenizer, chats: dict[str, Tokenizer], texts: list[str]) -> None:
    tokenizer = chats["chatml"]
    if not tokenizer._inner.decoder:
        return  # without a decoder letters may be lost
    prompt = tokenizer.build_prompt(messages_of(texts))
    expected = tokenizer._inner.decode(
        tokenizer.encode(prompt.text, add_special_tokens=False), skip_special_tokens=False
    )
    found = tokenizer._inner.decode(tokenizer.encode_prompt(prompt), skip_special_tokens=False)
    assert found.replace(" ", "") == expected.replace(" ", "")


@given(text=SPELLED)
def test_a_special_token_s_text_has_the_tokens_of_ordinary_text(base: Tokenizer, text: str) -> None:
    """Compared with the library's own option, if the vocabulary does not have the token among its pieces."""
    tokenizer = with_special(base, "{{ messages[0].content }}")
    prompt = tokenizer.build_prompt([{"role": "user", "content": text}])
    plain = tokenizers.Tokenizer.from_str(tokenizer._inner.to_str())
    plain.encode_special_tokens = True
    expected = plain.encode(text, add_special_tokens=False).ids
    if not set(expected) & set(special_ids(tokenizer)) - {tokenizer._inner.token_to_id("<unk>")}:
        assert tokenizer.encode_prompt(prompt) == expected


# --- tainted texts ---


@st.composite
def tainted(draw: st.DrawFn) -> TaintedText:
    letters = draw(st.lists(st.sampled_from("ab<> \n"), max_size=12))
    return TaintedText("".join(draw(st.sampled_from(["", "\ufdd0"])) + letter for letter in letters), "\ufdd0")


PARTS = st.one_of(st.text("ab<> \n", max_size=3), tainted())


def plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    if isinstance(value, TaintedText):
        return value.plain_text
    return value.replace("\ufdd0", "") if type(value) is str else value


OPERATIONS = {
    "strip": lambda t, p, n: t.strip(),
    "strip of": lambda t, p, n: t.strip("a<"),
    "lstrip": lambda t, p, n: t.lstrip(),
    "rstrip": lambda t, p, n: t.rstrip("\n"),
    "split": lambda t, p, n: t.split(p or "a"),
    "split at spaces": lambda t, p, n: t.split(),
    "split once": lambda t, p, n: t.split(p or "a", 1),
    "rsplit once": lambda t, p, n: t.rsplit(p or "a", 1),
    "rsplit at spaces": lambda t, p, n: t.rsplit(None, 1),
    "splitlines": lambda t, p, n: t.splitlines(n > 0),
    "partition": lambda t, p, n: t.partition(p or "a"),
    "rpartition": lambda t, p, n: t.rpartition(p or "a"),
    "removeprefix": lambda t, p, n: t.removeprefix(p),
    "removesuffix": lambda t, p, n: t.removesuffix(p),
    "replace": lambda t, p, n: t.replace(p or "a", "xy"),
    "replace some": lambda t, p, n: t.replace(p or "a", "", abs(n)),
    "find": lambda t, p, n: t.find(p, 1),
    "count": lambda t, p, n: t.count(p),
    "startswith": lambda t, p, n: t.startswith((p, "zz")),
    "endswith": lambda t, p, n: t.endswith(p),
    "in": lambda t, p, n: p in t,
    "equal": lambda t, p, n: (t == p, t != p, hash(t)),
    "length": lambda t, p, n: len(t),
    "cut": lambda t, p, n: (t[n:], t[:n], t[1:n], t[::-1], t[::2], t[0:0]),
    "letter": lambda t, p, n: t[n] if -len(t) <= n < len(t) else None,
    "letters": lambda t, p, n: list(t),
    "upper": lambda t, p, n: t.upper(),
    "added": lambda t, p, n: (t + p, p + t),
    "joined": lambda t, p, n: "".join(["b", t, p]),
    "formatted": lambda t, p, n: "{}-{}".format(t, p) + "%s" % t,  # noqa: UP031, UP032  templates do
    "repr": lambda t, p, n: (repr(t) + f"{t!r}").replace("\ufdd0", ""),
    "json": lambda t, p, n: json.dumps({"t": t}, ensure_ascii=False),
}


@settings(max_examples=2000)
@given(name=st.sampled_from(sorted(OPERATIONS)), text=tainted(), part=PARTS, n=st.integers(-4, 4))
def test_a_tainted_text_behaves_like_its_plain_text(name: str, text: TaintedText, part: str, n: int) -> None:
    operation = OPERATIONS[name]
    assert plain(operation(text, part, n)) == operation(text.plain_text, plain(part), n)


@given(text=tainted(), n=st.integers(-4, 4))
def test_slices_keep_the_marks(text: TaintedText, n: int) -> None:
    assert str.__str__(text[:n]) + str.__str__(text[n:]) == str.__str__(text)
    assert "".join(text) == str.__str__(text)
    assert "a".join(text.split("a")) == str.__str__(text).replace("\ufdd0a", "a")


@given(text=SPELLED)
def test_every_special_token_in_a_text_is_tainted(text: str) -> None:
    tracker = TaintTracker(SpecialTokenFinder(SPECIAL), text)
    read = tracker.untaint(str.__str__(tracker.taint(text)))
    assert read.text == text
    for special in SPECIAL:
        for start in range(len(text)):
            if text.startswith(special, start):
                assert read.is_tainted(start, start + len(special))
