"""Constraints: completions sampled under the token mask satisfy them; the mask allows exactly the valid tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vocabularies import byte_fallback, byte_level

from edgelm.errors import BundleError, RequestError
from edgelm.sampling import Sampler
from edgelm.text.constraint_compiler import ConstraintCompiler, Matcher
from edgelm.text.tokenizer import Tokenizer
from edgelm.types import Constraint, SamplingParams

EOS = (1,)
EXTRA = 45
"""Logits wider than the vocabulary, as models pad them."""
TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback}


@pytest.fixture(scope="module", params=sorted(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def grammar(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> ConstraintCompiler:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    tokenizer._inner.save(str(path))
    return ConstraintCompiler(path, tokenizer.vocab_size + EXTRA, EOS)


def allowed(matcher: Matcher, vocab_size: int) -> list[int]:
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any(), "a token that the vocabulary does not have is allowed"
    return np.flatnonzero(bits).tolist()


def complete(
    grammar: ConstraintCompiler, tokenizer: Tokenizer, constraint: Constraint, seed: int, limit: int = 150
) -> str | None:
    """Sample under the mask from uniform logits; None if the completion is not finished after `limit` tokens."""
    matcher = grammar.compile(constraint)
    width = tokenizer.vocab_size + EXTRA
    sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), width)
    closing = [token for name, token in tokenizer._inner.get_vocab().items() if name[-1] in '"}],' or name.isdigit()]
    tokens: list[int] = []
    while not matcher.is_finished:
        choices = allowed(matcher, tokenizer.vocab_size)
        assert (EOS[0] in choices) == matcher.is_accepting
        logits = np.zeros(width, dtype=np.float32)
        logits[[*closing, *EOS]] = len(tokens) / 10  # closing tokens get more likely with each step
        token = sampler.sample(logits, matcher.mask())
        assert token in choices
        matcher.accept(token)
        if token in EOS:
            assert matcher.is_finished
            break
        tokens.append(token)
        if len(tokens) == limit:
            return None
    return tokenizer.decode([*tokenizer.encode("x"), *tokens])[1:]


SCALARS: list[dict[str, Any]] = [
    {"type": "integer", "minimum": -20, "maximum": 500},
    {"type": "boolean"},
    {"enum": ["on", "off", "dim ☀", 3, None]},
    {"type": "string", "maxLength": 6},
    {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    {"const": {"a": [1, "é"]}},
]
NAMES = st.sampled_from(["intent", "slots", "é", 'q"', "a b", "漢字"])


@st.composite
def object_schemas(draw: st.DrawFn) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, st.sampled_from(SCALARS), max_size=3))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Check the few keywords that the tests use, one by one."""
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        names = set(value)
        fits = all(conforms(value[name], schema["properties"][name]) for name in names & set(schema["properties"]))
        return set(schema["required"]) <= names <= set(schema["properties"]) and fits
    if kind == "array":
        return len(value) <= schema["maxItems"] and all(conforms(item, schema["items"]) for item in value)
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return isinstance(value, bool) if kind == "boolean" else isinstance(value, str) and len(value) <= 6


@settings(max_examples=40)
@given(schema=object_schemas(), seed=st.integers(0, 2**32))
def test_completions_satisfy_their_schema(
    grammar: ConstraintCompiler, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    text = complete(grammar, tokenizer, Constraint("json_schema", json.dumps(schema)), seed)
    assume(text is not None)
    assert conforms(json.loads(text), schema)


@settings(max_examples=40)
@given(
    pattern=st.sampled_from(
        [r"[a-c]{2,5}", r"(on|off) [0-9]{1,3}%", r"[0-9]+(\.[0-9]+)?", r"é?(漢字|😀)+", r"[^x]{0,3}", r"a|ab|abc"]
    ),
    seed=st.integers(0, 2**32),
)
def test_completions_match_their_regex(
    grammar: ConstraintCompiler, tokenizer: Tokenizer, pattern: str, seed: int
) -> None:
    text = complete(grammar, tokenizer, Constraint("regex", pattern), seed)
    assume(text is not None)
    assert re.fullmatch(pattern, text, re.DOTALL)


@settings(max_examples=40)
@given(
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
)
def test_completions_are_among_their_choices(
    grammar: ConstraintCompiler, tokenizer: Tokenizer, choices: list[str], seed: int
) -> None:
    choices = [choice.replace("▁", "_") for choice in choices]
    assert complete(grammar, tokenizer, Constraint("choices", tuple(choices)), seed) in choices


def test_every_choice_can_be_chosen(grammar: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    choices = ("yes", "yes please", "no", 'quo"te\n\\')
    found = {complete(grammar, tokenizer, Constraint("choices", choices), seed) for seed in range(60)}
    assert found == set(choices)


def test_thousands_of_choices(grammar: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    choices = tuple(f"choice {number}" for number in range(5000))
    assert complete(grammar, tokenizer, Constraint("choices", choices), 0) in choices


def test_completions_follow_a_lark_grammar(grammar: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    lark = 'start: sum\nsum: NUMBER ("+" NUMBER){0,3}\nNUMBER: /[1-9][0-9]{0,2}/'
    texts = [complete(grammar, tokenizer, Constraint("lark", lark), seed) for seed in range(20)]
    assert all(text and re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){0,3}", text) for text in texts)
    assert any("+" in text for text in texts if text)


def test_whitespace_in_json_is_bounded(grammar: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    matcher = grammar.compile(Constraint("json_schema", '{"type": "object"}'))
    (brace,) = tokenizer.encode("x{", add_special_tokens=False)[-1:]
    newline = tokenizer.encode("x\n", add_special_tokens=False)[-1]
    matcher.accept(brace)
    count = 0
    while newline in allowed(matcher, tokenizer.vocab_size):
        matcher.accept(newline)
        count += 1
        assert count < 100
    assert count == 32


def test_only_forced_tokens_are_allowed_by_the_mask(grammar: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    matcher = grammar.compile(Constraint("regex", "(red|green) ball"))
    assert matcher.forced_tokens() == []
    (letter,) = tokenizer.encode("xr", add_special_tokens=False)[-1:]
    matcher.accept(letter)
    forced = matcher.forced_tokens()
    assert forced
    for token in forced:
        assert token in allowed(matcher, tokenizer.vocab_size)
        matcher.accept(token)
    assert "ed ball".startswith(tokenizer.decode([*tokenizer.encode("x"), *forced])[1:])


def test_two_matchers_of_one_constraint_are_independent(grammar: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    constraint = Constraint("choices", ("a", "b"))
    first, second = grammar.compile(constraint), grammar.compile(constraint)
    before = allowed(second, tokenizer.vocab_size)
    first.accept(before[0])
    assert first.is_finished
    assert not second.is_finished
    assert allowed(second, tokenizer.vocab_size) == before
    assert allowed(first, tokenizer.vocab_size) == list(EOS)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("regex", "[a-z", "unclosed character class"),
        ("regex", "(?=a)b", "look-around"),
        ("json_schema", "{", "Expecting property name"),
        ("json_schema", "[1]", "object"),
        ("json_schema", '{"type": "widget"}', "Invalid type: widget"),
        ("json_schema", '{"not": {}}', 'Unimplemented keys: \\["not"\\]'),
        ("json_schema", '{"type": "object", "allOf": [{"type": "string"}]}', "Unsatisfiable"),
        ("json_schema", "[" * 100_000, "json_schema"),
        ("lark", "start: nothing", 'unknown name: "nothing"'),
        ("lark", 'start: "a', "lexer error"),
        ("lark", f"start: {'(' * 5000}", "nested"),
        ("regex", "a\ud800", "regex"),
    ],
)
def test_an_invalid_constraint_is_a_one_line_error(
    kind: Any, value: str, message: str, grammar: ConstraintCompiler
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        grammar.compile(Constraint(kind, value))
    assert caught.value.code == "bad_request"
    assert str(caught.value).startswith(kind)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_token_outside_the_mask_is_an_internal_error(grammar: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    matcher = grammar.compile(Constraint("choices", ("a", "b")))
    wrong = next(t for t in range(3, tokenizer.vocab_size) if t not in allowed(matcher, tokenizer.vocab_size))
    with pytest.raises(RequestError, match=f"token {wrong} ") as caught:
        matcher.accept(wrong)
    assert caught.value.code == "internal"


def test_a_constraint_that_becomes_too_complex_is_a_bad_request(
    grammar: ConstraintCompiler, tokenizer: Tokenizer
) -> None:
    schema = {"type": "object", "properties": {f"k{number}": {} for number in range(3000)}}
    with pytest.raises(RequestError, match="2000") as caught:
        complete(grammar, tokenizer, Constraint("json_schema", json.dumps(schema)), 0)
    assert caught.value.code == "bad_request"
    assert "\n" not in str(caught.value)
    assert "<state>" not in str(caught.value)


def test_a_missing_too_large_or_invalid_tokenizer_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        ConstraintCompiler(tmp_path / "tokenizer.json", 100, EOS)
    path = tmp_path / "tokenizer.json"
    byte_level()._inner.save(str(path))
    with pytest.raises(BundleError, match="vocab size too small"):
        ConstraintCompiler(path, 100, EOS)
    path.write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        ConstraintCompiler(path, 1000, EOS)
