"""Random changes of bytes, JSON values, ONNX graphs and templates; each takes its random generator as an argument."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

import numpy as np

EXTREMES: list[Any] = [
    0, 1, -1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 1e308,
    -1e308, 1e-320, 0.5, float("nan"), float("inf"), float("-inf"), "", "x", "\0", "\n\x1b[2J", "../../x", "é" * 100,
    "a" * 100_000, "<eos>", "null", "\ufdd0", "\U0010ffff", None, True, False, [], {}, [[]], [None], [1] * 2000, {"a": {"b": []}},
]  # fmt: skip
DEEP = "@deep@"
"""Placeholder of deeply nested lists."""


def corrupt(rng: random.Random, data: bytes, max_changes: int = 4) -> bytes:
    """Return the bytes with flipped bits, and removed, repeated or overwritten parts."""
    found = bytearray(data)
    for _ in range(rng.randint(1, max_changes)):
        at, size = rng.randrange(max(1, len(found))), int(10 ** rng.uniform(0, 4))
        kind = rng.randrange(7)
        if kind in (0, 1) and found:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del found[at : at + size]
        elif kind == 3:
            found[at:at] = found[at : at + size]
        elif kind == 4:
            found[at : at + size] = rng.choice([b"\0", b"\xff", b"\x7f"]) * min(size, len(found) - at)
        elif kind == 5 and rng.random() < 0.3:
            del found[at:]
        else:
            found[at : at + 8] = rng.randbytes(8)[: len(found) - at]
    return bytes(found)


def list_places(value: Any, limit: int = 4000) -> list[tuple[Any, Any]]:
    """Return (container, key) of the values inside a JSON value; of long containers only the first and last ones."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < limit:
        each = waiting.pop()
        keys: list[Any] = []
        if isinstance(each, dict):
            keys = list(each)
        elif isinstance(each, list):
            keys = list(range(len(each)))
        if len(keys) > 40:
            keys = keys[:20] + keys[-20:]
        for key in keys:
            found.append((each, key))
            waiting.append(each[key])
    return found


def change(rng: random.Random, value: Any, max_changes: int = 3) -> Any:
    """Return a JSON value with some parts replaced, removed, duplicated or exchanged."""
    found = copy.deepcopy(value)
    for _ in range(rng.randint(1, max_changes)):
        at = list_places(found)
        if not at:
            return rng.choice(EXTREMES)
        container, key = rng.choice(at)
        kind = rng.randrange(10)
        if kind < 6:
            old = container[key]
            same = [each for each in EXTREMES if type(each) is type(old)]
            container[key] = rng.choice(same if same and rng.random() < 0.5 else EXTREMES)
        elif kind == 6:
            del container[key]
        elif kind == 7:
            other, name = rng.choice(at)
            container[key] = copy.deepcopy(other[name]) if name in _keys(other) else None
        elif kind == 8 and isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
        else:
            deep: Any = container[key]
            for _ in range(rng.choice([1, 20, 150])):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            container[key] = rng.choice([deep, deep, DEEP])
    return found


def _keys(container: Any) -> Any:
    return range(len(container)) if isinstance(container, list) else container


def as_json(value: Any) -> str:
    """Return JSON, possibly with NaN, lone surrogates and lists too deep for Python's parser."""
    return json.dumps(value, ensure_ascii=False).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)


# -- tokenizer.json ---------------------------------------------------------------------------------------------------

PARTS: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        {"type": "Replace", "pattern": {"Regex": "(x|x)*y"}, "content": "z"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "b"},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "t"}, "content": "tttttttttt"}] * 9},
        {"type": "Prepend", "prepend": "▁" * 10}, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Nonsense"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}, {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
        {"type": "Precompiled", "precompiled_charsmap": "ALQCAACEAAAAAACAAQAAgMz8AgC4BQAA"}, {"type": "ByteLevel"},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
    ],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"Regex": "(?:(?:o|o)+)+!"}, "behavior": "Isolated", "invert": True},
        {"type": "Split", "pattern": {"Regex": ""}, "behavior": "MergedWithNext", "invert": False},
        {"type": "Split", "pattern": {"Regex": "(" * 300 + ")" * 300}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"String": "a"}, "behavior": "Contiguous", "invert": True},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, {"type": "Whitespace"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, {"type": "UnicodeScripts"},
        {"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"}, None,
        {"type": "CharDelimiterSplit", "delimiter": "a"}, {"type": "FixedLength", "length": 0},
    ],
    "decoder": [
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}, None, {"type": "Fuse"},
        {"type": "ByteFallback"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "WordPiece", "prefix": "##", "cleanup": True}, {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}, {"type": "Strip", "content": "a", "start": 5, "stop": 5},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x" * 10_000},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "e"}, "content": "eeeeeeeeee"}] * 9},
    ],
    "post_processor": [
        None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}] * 3000, "pair": [],
         "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1] * 3000, "tokens": ["<bos>"] * 3000}}},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}},
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}], "pair": [],
         "special_tokens": {"<x>": {"id": "<x>", "ids": [4_000_000_000], "tokens": ["<x>"]}}},
        {"type": "BertProcessing", "sep": ["x", 102], "cls": ["y", 4_000_000_000]},
        {"type": "RobertaProcessing", "sep": ["x", 2], "cls": ["y", 0], "trim_offsets": True, "add_prefix_space": True},
    ],
    "padding": [
        {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
         "pad_token": "x"}, None,
    ],
    "truncation": [
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0},
        {"direction": "Right", "max_length": 2, "strategy": "OnlySecond", "stride": 9}, None,
    ],
}  # fmt: skip


def change_tokenizer(rng: random.Random, content: dict[str, Any]) -> Any:
    """Return a changed tokenizer.json."""
    found, kind = copy.deepcopy(content), rng.randrange(10)
    model = found["model"]
    if kind < 3:
        part = rng.choice(sorted(PARTS))
        found[part] = copy.deepcopy(rng.choice(PARTS[part]))
    elif kind < 5 and isinstance(model.get("vocab"), dict):
        vocab = model["vocab"]
        for text in rng.sample(sorted(vocab), rng.choice([1, 2, 30])):
            where = rng.randrange(4)
            if where == 0:
                del vocab[text]  # a missing id
            elif where == 1:
                vocab[text] = rng.choice(list(vocab.values()))  # a duplicate id
            elif where == 2:
                vocab[text] = rng.choice([2**32 - 1, 2**31, 10**6, 5_000_000, len(vocab) + 1])
            else:
                vocab[rng.choice(["", "x" * 100_000, "\0", "\ufdd0", text + "é"])] = vocab.pop(text)
    elif kind < 7 and isinstance(model.get("merges"), list) and model["merges"]:
        merges = model["merges"]
        at = rng.randrange(len(merges))
        merges[at : at + rng.choice([0, 1])] = rng.choice([
            ["nothing here"], [["", ""]], [["no", "thing"]], [""], ["a b c"], [[1, 2]], merges[:300], ["a"], [["a"]],
        ])  # fmt: skip
    elif kind == 7:
        for _ in range(rng.choice([1, 300])):
            found["added_tokens"].append({
                "id": rng.choice([0, 1, 2047, 2048, 10**6, 2**32 - 1, 2**33, -1]),
                "content": rng.choice(["", " ", "\n", "a", "the", "<eos>", "x" * 3000, "\ufdd0", "<0x41>", "\0", f"<{rng.random()}>"]),
                "single_word": rng.random() < 0.3, "lstrip": rng.random() < 0.3, "rstrip": rng.random() < 0.3,
                "normalized": rng.random() < 0.3, "special": rng.random() < 0.5,
            })  # fmt: skip
    elif kind == 8:
        model["type"] = rng.choice(["BPE", "Unigram", "WordPiece", "WordLevel", "Nonsense"])
        model["unk_token"] = rng.choice(["<unk>", "", None, "<eos>"])
        model["unk_id"] = rng.choice([None, 0, -1, 2**40])
        if model["type"] == "Unigram":
            model["vocab"] = [[text, rng.choice([-1.0, 0, 1e308, -1e308])] for text in model.get("vocab", {})]
    else:
        return change(rng, found)
    return found


# -- chat templates -----------------------------------------------------------------------------------------------------

TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}x",
    "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = ns.s.join([ns.s] * 20) %}{% endfor %}x",
    "{% set ns = namespace(s='ab') %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}x",
    "{{ 'a' * 10**9 }}", "{{ [0] * 10**9 }}", "{{ ('a' * 10**5) * 10**5 }}", "{{ (1, 2) * 10**10 }}", "{{ 10**9 * 'a' }}",
    "{{ 'a' * 100000 | length }}", "{{ 9**9**9 }}", "{{ 2**(2**31) }}", "{{ 1.5 ** 10**9 }}", "{{ (10**4000)**4000 }}",
    "{% set ns = namespace(n=10**18) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
    "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format('x') }}", "{{ '%.1000000000f' % 1.5 }}", "{{ '%*d' % (10**9, 1) }}",
    "{{ 'a'.ljust(10**10) }}", "{{ 'a'.center(10**9) }}", "{{ 'x' | center(10**9) }}", "{{ 'a'.zfill(10**9) }}",
    "{{ 'x\\n' * 1000 | indent(10**9) }}", "{{ 'x' | indent(10**9, true) }}", "{{ '\\t'.expandtabs(10**9) }}",
    "{{ [1] | tojson(indent=10**9) }}", "{{ [1] | tojson(10**9) }}", "{{ [[1]] | tojson(indent='x' * 10**6) }}",
    "{{ range(99999) | list | tojson }}", "{{ range(10**9) }}", "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "{{ lipsum(n=10**6) }}", "{{ lipsum(100000) }}", "{{ cycler(*range(99999)) }}", "{{ dict(a=1) | dictsort }}",
    "{{ 'abc' | wordwrap(1, wrapstring='x' * 10**6) }}", "{{ 'a' | batch(10**9, 'x') | list }}", "{{ [1] | slice(10**9) | list }}",
    "{{ range(99999) | batch(1) | list }}", "{{ 'a' * 99999 | urlize }}", "{{ ('<' * 99999) | striptags }}", "{{ ('a' * 99999 + '!') | urlize }}",
    "{{ range(99999) | sum }}", "{{ range(99999) | map('upper') | list | length }}", "{{ range(99999)|list|sort|unique|list|length }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for item in [[[]]] recursive %}{{ loop(item) }}{% endfor %}", "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "{{ [].__class__ }}", "{{ ''.__class__.__mro__ }}", "{{ ().__class__.__base__.__subclasses__() }}", "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{{ self._TemplateReference__context }}", "{{ raise_exception.__globals__ }}",
    "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{{ strftime_now('%Y' * 99999) }}", "{{ strftime_now('%999999999d') }}",
    "{{ strftime_now('\\0') }}", "{{ strftime_now(3) }}", "{{ raise_exception('x' * 10**6) }}", "{{ raise_exception('a\\nb\\x1b[2J') }}",
    "{{ raise_exception(messages) }}", "{% set messages = messages * 99999 %}{% for m in messages %}{{ m }}{% endfor %}",
    "{% if", "{{ x", "{% for %}", "{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "{{ " + "[" * 90 + "]" * 90 + " }}", "{{ " + "-" * 5000 + "1 }}",
    "{{ " + "1+" * 20000 + "1 }}", "{% if 1 %}" * 300 + "{% endif %}" * 300, "{{ 'a' ~ " * 100 + "'b'" + " }}" * 100, "x" * 900_000, "{{ 1 }}" * 60_000,
    "{{ ('a' * 50000) | replace('a', 'b' * 50000) }}", "{{ 'a'.replace('', 'x' * 99999) }}", "{{ ('a,' * 50000).split(',') * 1000 }}",
    "{{ (messages | string * 1000) | length }}", "{{ ('x' * 50000 + 'y') in ('x' * 99999) }}", "{{ 'a'.encode('utf-8') * 10**9 }}",
    "{{ 'a'.translate({97: 'b' * 99999}) * 1 }}", "{{ messages | map(attribute='content') | list | pprint }}", "{{ 'x'.join(range(9)|map('string')) }}",
    "{{ (0).to_bytes(10**9, 'big') }}", "{{ dict.fromkeys(range(9)) }}", "{{ ''.format(*range(99999)) }}", "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0[0]}'.format(messages) }}", "{{ ''.maketrans('a', 'b') }}", "{{ messages.append(messages) }}{{ messages }}", "{{ namespace(a=namespace) }}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}", "{% set x %}{% for i in range(99999) %}{{ 'y' * 999 }}{% endfor %}{% endset %}{{ x | length }}",
    "{% filter upper %}{% for i in range(99999) %}{{ 'y' * 9999 }}{% endfor %}{% endfilter %}", "{% call (x) f() %}{% endcall %}",
    "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a }}", "{{ 'a' | default('b' * 10**9) }}",
    "{{ messages | groupby('role') | list }}", "{{ range(99999) | random }}", "{% break %}", "{% for i in range(9) %}{% continue %}{% endfor %}",
    "{% generation %}{% for i in range(99999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}{% endgeneration %}", "{{ tools | tojson }}", "",
    "{{ messages[-1]['content'] * 10**8 }}", "{{ (messages[0].content ~ 'x') * 99999999 }}", "{{ 'aaaa' | truncate(10**9, True, 'x' * 10**7) }}",
    "{{ 'a' | format(10**9) }}", "{{ '%0999999999d' | format(1) }}", "{{ 10 ** 18 | round(10**9) }}", "{{ 1.0 | round(10**9) }}", "{{ 'x' | xmlattr }}",
    "{{ (1).__class__((('9' * 99999))) }}", "{{ ('9' * 99999) | int }}", "{{ ('9' * 4000) | int ** 900 }}", "{{ '1e999' | float }}", "{{ 1 // 0 }}", "{{ 1 << 10**10 }}",
    "{{ [1, 2] | combinations }}", "{{ 'a' if ('a' * 30) is match('(a+)+b') }}", "{{ loop }}", "{{ caller() }}", "{% raw %}" + "x" * 100 + "{% endraw %}",
    "{{ messages | tojson | length }}" * 2000, "{% set a = 'x' * 99999 %}{% set b = [a] * 99999 %}{{ b | join }}", "{{ ['x' * 99999] * 99999 | join | length }}",
    "{% set a = ['x' * 99999] * 9999 %}{{ a | join | length }}", "{% set a = ['x' * 99999] * 9999 %}{{ a | string | length }}", "{% set a = ['x' * 99999] * 999 %}{{ a | tojson | length }}",
    "{% set a = ['x' * 99999] * 9999 %}{{ ''.join(a) | length }}", "{% set a = range(99999) | list %}{% for i in a %}{{ a | sum }}{% endfor %}", "{% for i in range(99999) %}{{ a | sort | length }}{% endfor %}",
    "{% set a = range(99999) | list %}{% for i in range(9999) %}{% if a | sort | length %}{% endif %}{% endfor %}", "{% set a = 'x' * 99999 %}{% for i in range(99999) %}{% if a | upper %}{% endif %}{% endfor %}",
]  # fmt: skip


def template(rng: random.Random, original: str) -> str:
    """Return a chat template that is slow, produces too much, or is invalid."""
    kind = rng.randrange(10)
    if kind < 6:
        return rng.choice(TEMPLATES)
    if kind < 8:
        return rng.choice(TEMPLATES) + rng.choice(TEMPLATES)
    if kind == 8:  # with other numbers
        return re.sub(r"\d+", lambda _: str(rng.choice([0, 1, 9, 10**5, 10**9, 10**20, -1])), rng.choice(TEMPLATES))
    return corrupt(rng, rng.choice([original, *TEMPLATES]).encode()[:5000]).decode("utf-8", "replace")


# -- ONNX graphs --------------------------------------------------------------------------------------------------------

OPERATORS = [
    "Add", "BitShift", "BitwiseAnd", "BitwiseXor", "Cast", "Gather", "GatherBlockQuantized", "Gelu", "Gemm",
    "GroupQueryAttention", "Identity", "MatMul", "MatMulNBits", "Mul", "QuickGelu", "Reshape", "RotaryEmbedding",
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "Slice", "Split", "Tanh", "Unsqueeze", "Tile", "If",
    "Loop", "Expand", "Range", "ConstantOfShape", "RandomNormal",
]  # fmt: skip
DOMAINS = ["", "ai.onnx", "com.microsoft", "edgelm", "evil", "ai.onnx.ml", "com.ms.internal.nhwc"]
SIZES = [
    0,
    1,
    2,
    3,
    8,
    16,
    31,
    32,
    64,
    96,
    191,
    192,
    193,
    256,
    320,
    512,
    2047,
    2048,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**62,
    -1,
    -2,
    -(2**31),
    -(2**63),
]


class Graph:
    """Changes an ONNX graph; needs the package onnx."""

    def __init__(self, rng: random.Random, data: bytes) -> None:
        import onnx

        self.rng = rng
        self.model = onnx.load_from_string(data)

    def changed(self) -> bytes:
        """Return the graph after one to three changes."""
        kinds = [
            self.dims, self.dims, self.attribute, self.attribute, self.attribute, self.inputs, self.inputs, self.inputs, self.dtype,
            self.nodes, self.place, self.value_info, self.opset, self.operator, self.constants, self.constants, self.constants, self.insert,
        ]  # fmt: skip
        for _ in range(self.rng.choice([1, 1, 1, 2, 3])):
            self.rng.choice(kinds)()
        return bytes(self.model.SerializeToString())

    def _node(self) -> Any:
        """Return a random node of a random operator."""
        nodes = self.model.graph.node
        operator = self.rng.choice(sorted({node.op_type for node in nodes}))
        return self.rng.choice([node for node in nodes if node.op_type == operator])

    def _names(self) -> list[str]:
        graph = self.model.graph
        names = [name for node in graph.node for name in node.output]
        return [*names, *(t.name for t in graph.initializer), *(v.name for v in graph.input), ""]

    def dims(self) -> None:
        tensor = self.rng.choice(self.model.graph.initializer)
        sizes = list(tensor.dims)
        kind = self.rng.randrange(5)
        if kind == 0:
            self.rng.shuffle(sizes)
        elif kind == 1 and sizes:
            sizes[self.rng.randrange(len(sizes))] = self.rng.choice(SIZES)
        elif kind == 2:
            sizes.insert(self.rng.randrange(len(sizes) + 1), self.rng.choice([1, 1, 0, 2]))
        elif kind == 3 and len(sizes) > 1:
            sizes[:2] = [sizes[0] * sizes[1]]
        elif sizes:
            sizes.pop()
        del tensor.dims[:]
        tensor.dims.extend(sizes)

    def attribute(self) -> None:
        from onnx import helper

        node = self._node()
        if not node.attribute or self.rng.random() < 0.15:
            name = self.rng.choice(["axis", "bits", "K", "N", "do_rotary", "rotary_interleaved", "smooth_softmax", "softcap", "keepdims",
                                    "to", "direction", "num_outputs", "allowzero", "local_window_size", "accuracy_level", "weight_prepacked",
                                    "batch_dims", "epsilon", "qk_output", "kv_cache_bit_width", "k_quant_type", "v_quant_type", "transA",
                                    "saturate", "stash_type", "interleaved", "num_heads", "scale", "is_packed_batching"])  # fmt: skip
            node.attribute.append(
                helper.make_attribute(
                    name, self.rng.choice([0, 1, -1, 8, 2**40, 0.5, float("nan"), "LEFT", "PER_TENSOR", [1, 2]])
                )
            )
            return
        attribute = self.rng.choice(node.attribute)
        if self.rng.random() < 0.15:
            node.attribute.remove(attribute)
        elif attribute.type == 2:
            attribute.i = self.rng.choice([*SIZES, *range(-3, 20)])
        elif attribute.type == 1:
            attribute.f = self.rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf"), 1e-45])
        else:
            attribute.s = self.rng.choice(
                [b"", b"RIGHT", b"LEFT", b"PER_CHANNEL", b"PER_TENSOR", b"NONE", b"\xff", b"x" * 5000]
            )

    def inputs(self) -> None:
        node, rng = self._node(), self.rng
        if not node.input:
            return
        at, kind = rng.randrange(len(node.input)), rng.randrange(5)
        if kind == 0:
            other = self._node()
            if other.input:
                there = rng.randrange(len(other.input))
                node.input[at], other.input[there] = other.input[there], node.input[at]
        elif kind == 1:
            node.input[at] = ""
        elif kind == 2:
            del node.input[at]
        elif kind == 3:
            node.input[at] = rng.choice(self._names())
        else:
            node.input.extend([""] * rng.choice([0, 0, 1, 3]) + [rng.choice(self._names())])

    def dtype(self) -> None:
        self.rng.choice(self.model.graph.initializer).data_type = self.rng.choice([*range(24), 99])

    def nodes(self) -> None:
        nodes, rng = self.model.graph.node, self.rng
        node = self._node()
        at, kind = list(nodes).index(node), rng.randrange(4)
        if kind == 0:
            nodes.remove(node)
        elif kind == 1:
            nodes.insert(at, node)
        elif kind == 2:
            taken = copy.deepcopy(node)
            nodes.remove(node)
            nodes.insert(rng.randrange(len(nodes)), taken)
        else:  # bypassed: readers of its output read its input
            for other in nodes:
                for index, name in enumerate(other.input):
                    if name and name in node.output and node.input:
                        other.input[index] = node.input[0]
            nodes.remove(node)

    def place(self) -> None:
        tensors = [tensor for tensor in self.model.graph.initializer if tensor.data_location == 1]
        if not tensors:
            return
        entries = self.rng.choice(tensors).external_data
        entry = self.rng.choice(entries)
        old = int(entry.value) if entry.value.isdigit() else 0
        entry.value = str(
            self.rng.choice(
                [0, old + 1, old - 1, old * 2, old + 4096, 2**40, 2**63, -1, "", "x", "manifest.json", "/etc/passwd"]
            )
        )
        if self.rng.random() < 0.2:
            entries.remove(entry)

    def value_info(self) -> None:
        graph = self.model.graph
        value = self.rng.choice([*graph.input, *graph.output])
        kind = self.rng.randrange(4)
        if kind == 0:
            value.type.tensor_type.elem_type = self.rng.choice([1, 3, 6, 7, 9, 10, 11, 0])
        elif kind == 1 and value.type.tensor_type.shape.dim:
            self.rng.choice(value.type.tensor_type.shape.dim).dim_value = self.rng.choice(SIZES)
        elif kind == 2:
            value.type.tensor_type.shape.dim.add().dim_value = self.rng.choice([1, 3])
        else:
            value.name = self.rng.choice(self._names())

    def opset(self) -> None:
        entry = self.rng.choice(self.model.opset_import)
        if self.rng.random() < 0.3:
            entry.domain = self.rng.choice(DOMAINS)
        else:
            entry.version = self.rng.choice([0, 1, 6, 9, 12, 13, 16, 17, 19, 22, 24, 999, 2**40, -1])
        if self.rng.random() < 0.3:
            self.model.ir_version = self.rng.choice([0, 1, 3, 4, 9, 11, 13, 999])

    def operator(self) -> None:
        node = self._node()
        if self.rng.random() < 0.5:
            node.op_type = self.rng.choice(OPERATORS)
        else:
            node.domain = self.rng.choice(DOMAINS)

    def constants(self) -> None:
        """Change numbers of a small tensor, usually one that defines shapes."""
        from onnx import helper, numpy_helper

        small = [
            t
            for t in self.model.graph.initializer
            if np.prod(t.dims) <= 64 and t.data_location != 1 and len(t.dims) <= 2
        ]
        shaping = [tensor for tensor in small if tensor.data_type in (6, 7)] or small
        if not small:
            return
        tensor = self.rng.choice(shaping if self.rng.random() < 0.8 else small)
        try:
            array = numpy_helper.to_array(tensor).copy()
        except (ValueError, TypeError):
            return
        flat = array.reshape(-1)
        if not flat.size or self.rng.random() < 0.15:
            flat = np.resize(flat if flat.size else np.zeros(1, flat.dtype), self.rng.choice([0, 1, 2, 5, 9, 40]))
            array = flat
        if flat.size:
            with np.errstate(all="ignore"):
                value = self.rng.choice(SIZES if array.dtype.kind in "iu" else [0.0, float("nan"), 1e38, -1.0])
                flat[self.rng.randrange(flat.size)] = np.array(value).astype(array.dtype)
        tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, array.shape, array.tobytes(), raw=True))

    def insert(self) -> None:
        """Insert a node with its own constants before an input of another node."""
        from onnx import helper, numpy_helper

        node, rng, graph = self._node(), self.rng, self.model.graph
        if not node.input:
            return
        mark = f"inserted.{rng.randrange(10**9)}"

        def stored(*values: int) -> str:
            name = f"{mark}.{len(graph.initializer)}"
            graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
            return name

        at = rng.randrange(len(node.input))
        old, some = node.input[at], lambda: rng.choice([0, 1, -1, 2, 3, 64, 2**31, 2**62, -(2**62)])
        operator = rng.choice(
            [
                "Reshape",
                "Slice",
                "Unsqueeze",
                "Split",
                "Gather",
                "Cast",
                "BitShift",
                "Identity",
                "Tanh",
                "Add",
                "MatMul",
            ]
        )
        more: dict[str, Any] = {}
        inputs = [old]
        if operator == "Reshape":
            inputs.append(stored(*[some() for _ in range(rng.randrange(6))]))
        elif operator == "Slice":
            inputs += [
                stored(some()),
                stored(some()),
                stored(rng.choice([0, 1, 2, -1, 9])),
                stored(rng.choice([0, 1, -1, 2**62])),
            ]
        elif operator == "Unsqueeze":
            inputs.append(stored(*[rng.choice([0, 1, -1, 5, 99]) for _ in range(rng.randrange(12))]))
        elif operator == "Split":
            inputs.append(stored(some(), some()))
        elif operator == "Gather":
            inputs.append(stored(some(), some()))
            more["axis"] = rng.choice([0, 1, 2, -1, 9])
        elif operator == "Cast":
            more["to"] = rng.choice([*range(24), 99])
        elif operator == "BitShift":
            inputs.append(rng.choice(self._names()))
            more["direction"] = rng.choice(["LEFT", "RIGHT"])
        elif operator in ("Add", "MatMul"):
            inputs.append(rng.choice(self._names()))
        outputs = [mark, f"{mark}.second"] if operator == "Split" else [mark]
        new = helper.make_node(operator, inputs, outputs, **more)
        graph.node.insert(list(graph.node).index(node), new)
        node.input[at] = mark
