"""The tokenizer with valid and invalid files, texts and conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vocabularies import byte_fallback, byte_level

from edgelm.errors import BundleError, RequestError
from edgelm.text.tokenizer import StreamDecoder, Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template: Any) -> Tokenizer:
    return Tokenizer(byte_level()._inner, template, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    byte_level()._inner.save(str(path))
    return path


def test_a_saved_tokenizer_is_read_back(saved: Path) -> None:
    read = Tokenizer.from_file(saved)
    assert read.vocab_size == byte_level().vocab_size
    assert read.encode("café 😀") == byte_level().encode("café 😀")


def test_truncation_and_padding_of_the_file_are_ignored(saved: Path) -> None:
    inner = byte_level()._inner.from_file(str(saved))
    inner.enable_truncation(3)
    inner.enable_padding(length=100)
    inner.save(str(saved))
    text = "a cat who played in the kitchen"
    assert Tokenizer.from_file(saved).encode(text) == byte_level().encode(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "tokenizer.json"),
        (lambda path: path.write_text("{}"), "tokenizer.json"),
        (lambda path: path.write_bytes(b"\xff\x00"), "tokenizer.json"),
        (lambda path: (path.unlink(), path.mkdir()), "tokenizer.json"),
    ],
)
def test_an_invalid_file_is_a_one_line_error(saved: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(saved)
    with pytest.raises(BundleError, match=message) as caught:
        Tokenizer.from_file(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lone_surrogates_are_a_bad_request() -> None:
    with pytest.raises(RequestError, match="Unicode") as caught:
        byte_level().encode("a\ud800b")
    assert caught.value.code == "bad_request"


def test_special_tokens_are_added_on_request() -> None:
    tokenizer = byte_fallback()
    assert tokenizer.encode("a") == [1, *tokenizer.encode("a", add_special_tokens=False)]


def test_byte_tokens_are_those_of_the_vocabulary() -> None:
    assert byte_level().byte_tokens == {}
    assert sorted(byte_fallback().byte_tokens.values()) == list(range(256))


def test_a_word_after_a_prompt_keeps_its_space() -> None:
    tokenizer = byte_fallback()
    prompt, answer = tokenizer.encode("Once"), tokenizer.encode("there was", add_special_tokens=False)
    assert tokenizer.decode(answer) == "there was"
    decoder = StreamDecoder(tokenizer, prompt)
    assert "".join([decoder.push(token) for token in answer] + [decoder.finish()]) == " there was"


@pytest.mark.parametrize("space", ["<0x20>", "▁"])
def test_only_the_first_space_is_dropped_for_both_encodings_of_a_space(space: str) -> None:
    tokenizer = byte_fallback()
    ids = tokenizer._inner.get_vocab()
    word = next(name for name in sorted(ids) if name.startswith("▁") and len(name) > 1)
    spelled = [ids[name] for name in (space, space, word, space, word, "a")]
    for count in range(len(spelled) + 1):
        decoder = StreamDecoder(tokenizer)
        shown = "".join([decoder.push(token) for token in spelled[:count]] + [decoder.finish()])
        assert shown == tokenizer.decode(spelled[:count])


def test_a_space_is_kept_after_special_tokens() -> None:
    tokenizer = byte_fallback()
    decoder = StreamDecoder(tokenizer, tokenizer.encode("Once"))
    answer = [1] * 40 + tokenizer.encode("there", add_special_tokens=False)
    assert "".join(decoder.push(token) for token in answer) == " there"


def test_only_a_broken_character_of_the_completion_is_returned() -> None:
    tokenizer = byte_fallback()
    names = {byte: token for token, byte in tokenizer.byte_tokens.items()}
    letter = tokenizer.encode("a", add_special_tokens=False)[-1:]
    prompt = [*tokenizer.encode("Once"), names[0xE2]]
    for answer, text in (
        (letter, "a"),
        ([names[0x82], names[0xAC], *letter], "€a"),
        ([names[0x82], names[0xAC], names[0xE2], *letter], "€\ufffda"),
    ):
        decoder = StreamDecoder(tokenizer, prompt)
        shown = "".join([decoder.push(token) for token in answer] + [decoder.finish()])
        assert shown.replace(" ", "") == text


def test_a_stop_string_across_tokens_is_never_returned() -> None:
    tokenizer = byte_fallback()
    decoder = StreamDecoder(tokenizer, tokenizer.encode("Once"), stop=("\n\nUser", "!?"))
    shown = [
        decoder.push(token) for token in tokenizer.encode("there\n\nUse it\n\nUser: hi!?", add_special_tokens=False)
    ]
    assert "".join(shown) == " there\n\nUse it"
    assert decoder.is_stopped
    assert decoder.finish() == ""


def test_the_start_of_a_stop_string_is_returned_at_the_end() -> None:
    tokenizer = byte_level()
    decoder = StreamDecoder(tokenizer, stop=("END",))
    assert "".join(decoder.push(token) for token in tokenizer.encode("the EN")) == "the "
    assert decoder.finish() == "EN"
    assert decoder.text == "the EN"


def test_render_chat() -> None:
    messages = [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "hi"}]
    assert with_template(CHATML).render_chat(messages) == (
        "<|im_start|>system\nBe <brief>.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "templates",
    [
        [{"name": "only", "template": "{{ bos_token }}{{ messages[0].content }}"}],
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "<s>{{ messages[0]['content'] }}"}],
    ],
)
def test_the_default_or_only_one_of_several_templates_is_used(templates: list[dict[str, str]]) -> None:
    assert with_template(templates).render_chat([{"role": "user", "content": "hi"}]) == "<s>hi"


@pytest.mark.parametrize(
    ("template", "messages", "code", "message"),
    [
        (None, [{"role": "user", "content": "a"}], "bad_request", "chat template"),
        (CHATML, [], "bad_request", "messages"),
        (CHATML, ["hi"], "bad_request", "each message"),
        (CHATML, [{"content": "hi"}], "bad_request", "each message"),
        (CHATML, [{"role": 3, "content": "hi"}], "bad_request", "each message"),
        ("{{ raise_exception('no system role') }}", [{"role": "system"}], "bad_request", "no system role"),
        ("{{ messages[0].content.x.y }}", [{"role": "user"}], "bad_request", "chat template"),
        ("{{ 1 / 0 }}", [{"role": "user"}], "bad_request", "division"),
        ("{% if %}", [{"role": "user"}], "internal", "chat template"),
        (
            [{"name": "a", "template": ""}, {"name": "b", "template": ""}],
            [{"role": "u"}],
            "internal",
            "a, b",
        ),
    ],
)
def test_a_failed_rendering_is_a_one_line_error(template: Any, messages: Any, code: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        with_template(template).render_chat(messages)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% set _ = messages.append(1) %}",
        "{{ messages[0].update(role='x') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(attack: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(RequestError, match="chat template"):
        with_template(attack).render_chat(messages)
    assert messages == [{"role": "user", "content": "hi"}]


def test_a_published_tokenizer(stories_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(stories_checkpoint / "tokenizer.json")
    assert tokenizer.vocab_size == 512
    assert tokenizer.encode("Once upon") == [1, 403, 407]
