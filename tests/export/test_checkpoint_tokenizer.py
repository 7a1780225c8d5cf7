"""The tokenizer of a checkpoint: bos and eos as its class adds them, end tokens, special tokens."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers

pytest.importorskip("onnx", reason="needs pip install 'edgelm[export]'")

import edgelm_export
from edgelm_export.checkpoint import metadata, open_checkpoint
from tiny import TinyLlama, tokenizer_json, write_json

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import CheckpointError
from edgelm.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def stories(stories_checkpoint, tmp_path):
    return shutil.copytree(stories_checkpoint, tmp_path / "stories")


@pytest.fixture
def tiny(tmp_path):
    return TinyLlama(vocab=400).write(tmp_path / "tiny")


def change(file, **changes):
    content = json.loads(file.read_text()) if file.is_file() else {}
    write_json(file, {key: value for key, value in {**content, **changes}.items() if value is not ...})


def ids(folder, text="hello"):
    return tokenizers.Tokenizer.from_str(open_checkpoint(folder).tokenizer_text).encode(text).ids


BARE = [281, 306, 414]
PROCESSORS = {"none": None, "bos": ..., "wrong": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    ("kind", "switches", "expected"),
    [
        ("LlamaTokenizer", {}, [1, *BARE]),
        ("LlamaTokenizerFast", {"add_bos_token": ..., "add_eos_token": ...}, [1, *BARE]),
        ("LlamaTokenizer", {"add_bos_token": None}, [1, *BARE]),
        ("LlamaTokenizer", {"add_bos_token": False}, BARE),
        ("LlamaTokenizerFast", {"add_bos_token": True, "add_eos_token": True}, [1, *BARE, 2]),
        ("LlamaTokenizerFast", {"add_bos_token": False, "add_eos_token": True}, [*BARE, 2]),
        ("CodeLlamaTokenizer", {"add_bos_token": False}, BARE),
        ("GemmaTokenizer", {}, [1, *BARE]),
        ("GemmaTokenizerFast", {"add_bos_token": False}, BARE),
        ("GemmaTokenizerFast", {"add_eos_token": True}, [1, *BARE, 2]),
        ("GPTNeoXTokenizer", {"add_bos_token": ...}, BARE),
        ("GPTNeoXTokenizer", {}, [1, *BARE]),
        ("PreTrainedTokenizerFast", {}, [1, *BARE]),
        ("Qwen2Tokenizer", {"add_bos_token": True}, [1, *BARE]),
        (..., {"add_bos_token": True}, [1, *BARE]),
    ],
)
def test_bos_and_eos_as_the_class_adds_them(stories, processor, kind, switches, expected):
    """stories260K has add_bos_token true."""
    if PROCESSORS[processor] is not ...:
        change(stories / "tokenizer.json", post_processor=PROCESSORS[processor])
    change(stories / "tokenizer_config.json", tokenizer_class=kind, **switches)
    assert ids(stories) == expected


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", ...])
@pytest.mark.parametrize("switch", [False, None, ...])
def test_other_classes_use_the_post_processor_of_the_file(tiny, kind, switch):
    change(tiny / "tokenizer_config.json", tokenizer_class=kind, add_bos_token=switch)
    change(tiny / "config.json", model_type="qwen2")
    before = tokenizers.Tokenizer.from_str(tokenizer_json()).encode("hello").ids
    assert ids(tiny) == before
    assert open_checkpoint(tiny).tokenizer_text == (tiny / "tokenizer.json").read_text()


def test_a_byte_level_tokenizer_of_class_llama_as_deepseek_publishes_it(tiny):
    change(
        tiny / "tokenizer.json", post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    )
    bare = ids(tiny, "a")
    for kind in ("LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer"):
        change(tiny / "tokenizer_config.json", tokenizer_class=kind, add_bos_token=True, add_eos_token=False)
        assert ids(tiny, "a") == [0, *bare]


@pytest.mark.parametrize("kind", ["LlamaTokenizerFast", "GemmaTokenizerFast", "GPTNeoXTokenizerFast"])
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_as_transformers_loads_it(stories, kind, bos, eos):
    transformers = pytest.importorskip("transformers", reason="needs pip install 'edgelm[distill]'")
    change(stories / "tokenizer.json", post_processor=None)
    change(stories / "tokenizer_config.json", tokenizer_class=kind, add_bos_token=bos, add_eos_token=eos)
    reference = getattr(transformers, kind).from_pretrained(stories)
    for text in ("hello", "", "Once upon a time", " a"):
        assert ids(stories, text) == reference.encode(text)


def test_a_bad_switch_is_named(stories):
    change(stories / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token="yes")
    with pytest.raises(CheckpointError, match=r"add_bos_token.*'yes'"):
        open_checkpoint(stories)


def test_the_bundle_adds_bos_also_with_a_pruned_vocabulary(stories, tmp_path):
    change(stories / "tokenizer.json", post_processor=None)
    change(stories / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    corpus = tmp_path / "text"
    corpus.write_text("Once upon a time there was a little girl. hello " * 30)
    edgelm_export.export(stories, tmp_path / "small", quant="fp32", vocab=corpus, vocab_size=400)
    edgelm_export.export(stories, tmp_path / "whole", quant="fp32")
    for out in ("small", "whole"):
        bundle = open_bundle(tmp_path / out)
        encoded = Tokenizer.of_bundle(bundle).encode("hello")
        assert encoded[0] == bundle.manifest.bos_token
        assert len(encoded) == 4


# --- special tokens ---


@pytest.mark.parametrize("newer", [False, True])
def test_special_tokens_map(tiny, newer):
    """It overrides tokenizer_config.json, unless that has the newer form, which also lists added tokens."""
    decoder = {"added_tokens_decoder": {}} if newer else {}
    change(tiny / "tokenizer_config.json", bos_token="<s>", eos_token=..., **decoder)
    write_json(
        tiny / "special_tokens_map.json",
        {
            "bos_token": "</s>",
            "eos_token": {"content": "</s>", "lstrip": False},
            "pad_token": "<s>",
            "unk_token": "<u>",
        },
    )
    found = metadata.special_tokens(open_checkpoint(tiny))
    bos = "<s>" if newer else "</s>"
    assert found == {"bos_token": bos, "eos_token": "</s>", "pad_token": "<s>", "unk_token": "<u>"}


def test_all_four_special_tokens_reach_the_template(tiny, tmp_path):
    template = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ messages[0].content }}"
    write_json(tiny / "special_tokens_map.json", {"pad_token": "<pad>", "unk_token": {"content": "<unk>"}})
    change(tiny / "tokenizer_config.json", chat_template=template)
    edgelm_export.export(tiny, tmp_path / "out", quant="fp32")
    tokenizer = Tokenizer.of_bundle(open_bundle(tmp_path / "out"))
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "<s>|</s>|<pad>|<unk>|x"


def test_special_tokens_of_the_class_alone(stories):
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        (stories / file).unlink(missing_ok=True)
    write_json(stories / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    checkpoint = open_checkpoint(stories)
    assert metadata.special_tokens(checkpoint) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert ids(stories) == [1, *BARE]


# --- end tokens ---


def with_added(tiny, *names, special=True):
    tokenizer = json.loads(tokenizer_json())
    first = len(tokenizer["model"]["vocab"])
    added = [
        {**tokenizer["added_tokens"][0], "id": first + i, "content": name, "special": special}
        for i, name in enumerate(names)
    ]
    write_json(tiny / "tokenizer.json", {**tokenizer, "added_tokens": [*tokenizer["added_tokens"], *added]})
    return first


@pytest.mark.parametrize("special", [True, False])
def test_end_tokens_are_those_of_all_sources(tiny, special):
    first = with_added(tiny, "<|im_start|>", "<|im_end|>", "<|end|>", special=special)
    write_json(tiny / "generation_config.json", {"eos_token_id": [5]})
    change(tiny / "config.json", eos_token_id=6)
    change(tiny / "tokenizer_config.json", eos_token="<|end|>", chat_template=CHATML)
    assert metadata.eos_tokens(open_checkpoint(tiny)) == (5, 6, first + 2, first + 1)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_end|>"),
        (CHATML.replace("m.content }}", "m.content | trim }}\n"), "<|im_end|>"),
        (
            "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} </s>{% endif %}{% endfor %}",
            "</s>",
        ),
        ("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }} and <|im_end|>{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
        ("{% if %}", None),
        (None, None),
    ],
)
def test_the_token_with_which_a_template_ends_an_answer(tiny, template, expected):
    with_added(tiny, "<|im_start|>", "<|im_end|>", "<|im_end|>x")
    change(tiny / "tokenizer_config.json", chat_template=template)
    assert metadata.end_of_turn(open_checkpoint(tiny)) == expected


def test_an_answer_ends_at_the_end_token_of_the_template(tiny, tmp_path):
    """A base model's configuration with a chat template added: the turn still ends."""
    first = with_added(tiny, "<|im_start|>", "<|im_end|>")
    change(tiny / "tokenizer_config.json", chat_template=CHATML)
    edgelm_export.export(tiny, tmp_path / "out", quant="fp32")
    with edgelm.load(tmp_path / "out", threads=1) as model:
        assert model.manifest.eos_tokens == (1, first + 1)
        done = model.generate(messages=[{"role": "user", "content": "<|im_end|>"}], max_tokens=2)
        quiet = model.generate(messages=[{"role": "user", "content": "a"}], max_tokens=2)
        assert done.usage.prompt_tokens > quiet.usage.prompt_tokens + 5
