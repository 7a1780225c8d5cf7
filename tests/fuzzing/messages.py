"""Hostile requests, each from a seed and a number. Knows nothing of connections.

Has its own JSON writer, because the standard one refuses much of what a client can send.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edgelm.mqtt.packets import MAX_PAYLOAD_BYTES
from edgelm.mqtt.request_codec import KNOWN_KEYS

CLIENTS = tuple(f"c{number}" for number in range(10))
MAX_TOKENS = 3
"""Tokens of a completion in requests with `max_tokens`: only the request's path is fuzzed."""
MAX_CORRELATION_BYTES = 60_000


class Text(str):
    """JSON text that is written unchanged."""

    __slots__ = ()


class Pairs(list[Any]):
    """Keys and values of an object, where a key may occur twice."""


@dataclass
class Message:
    """One request, or a cancellation."""

    payload: bytes
    action: str = "generate"
    client: str | None = None
    reply: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    user: list[tuple[str, str]] = field(default_factory=list)
    content_type: str | None = None
    is_text: bool | None = None
    is_strict: bool = True
    """Whether exactly one final message must come; else at most one, because its topic may be refused."""

    @property
    def is_constrained(self) -> bool:
        """Whether it may have a constraint, whose trial takes up to three seconds."""
        return any(key in self.payload for key in (b'"regex"', b'"json_schema"', b'"choices"'))


NUMBERS: list[Any] = [
    0, 1, -1, 2, 3, 0.5, 1e-9, -0.0, 2**31, -(2**31), 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) + 1, 2**64,
    10**30, 10**400, 1e308, -1e308, 5e-324,
    *map(Text, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1E+400", "0.1e-999", "-0", "9" * 4400, "01", "+1")),
]  # fmt: skip
TEXTS: list[Any] = [
    "", "x", "\0", "ü", "é" * 50, "\x7f\x80", "\ufeff", "\u2028\u2029", "\ufdd0\ufdd1", "\U000fffff", "a" * 300,
    "x" * 20_000, "🏳️‍🌈" * 40, "e\u0301" * 100, "\u202ereversed", "ﷺ" * 30, "\x1b[2J\x1b]0;owned\x07", "<eos>", "<bos><answer>",
    "{{ 7 * 7 }}", "{% for i in range(99999) %}", "../../etc/passwd", "%s%n", "null", " ", "\n" * 500, "١٢٣", "Ⅷ",
    Text('"\\ud800"'), Text('"\\udc00\\ud800"'), Text('"\\ud83d\\ude00"'), Text('"\\x"'), Text('"unfinished'),
]  # fmt: skip
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"": {}}, Text(""), Text("[" * 3000), Text("nul")]
TOPICS = [
    "", "#", "a/+", "a/#", "$SYS/x", "x" * 257, "a\nb", "homeassistant/x", "edgelm/pool/a/generate",
    "edgelm/fuzzed/generate", "edgelm/fuzzed/status", "edgelm/client/c1/response", "edgelm/other/response", "/", "//",
    "edgelm", "edgelm//generate", "ü/é", "fuzz/" + "a/" * 100, "edgelm/client/victim/response",
]  # fmt: skip
PATTERNS = [
    "(a+)+b", "(a|a)*$", "a{1000}", "a{100000}", "(a{1000}){1000}", "((a{100}){100}){100}", "(.*)*x", "[a-z]{0,5000}",
    "(?=a)b", "(?<=a)b", r"\p{L}{300}", r"(\w+\s?)+$", "(" * 500 + "a" + ")" * 500, "(a?){60}a{60}", "[", "(", "\\",
    "a**", "", "^$", ".{1,60000}", "(a|b|c|d|e|f|g|h){200}", r"\d+(\.\d+)?(e\d+)?", "yes|no", "[^a]", "(?i)straße",
    r"(.*a.*b.*c.*){20}", "|".join(f"word{i}" for i in range(3000)), ".*" * 60, "(a*)*" * 30, "[\\x00-\\U0010ffff]{999}",
]  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}


def message(seed: int, number: int) -> Message:
    """Return the request of a number; equal arguments give equal requests."""
    return _MessageMaker(random.Random(f"{seed}:{number}")).make()


def text_of(value: Any) -> str:
    """Return JSON text, possibly invalid."""
    if isinstance(value, Text):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{text_of(name)}: {text_of(each)}" for name, each in value) + "}"
    if isinstance(value, dict):
        return text_of(Pairs(value.items()))
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


class _MessageMaker:
    """Makes one message from a random generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def make(self) -> Message:
        kinds: list[tuple[int, Callable[[], Message]]] = [
            (8, self.noise), (22, self.one_key), (8, self.several_keys), (10, self.broken_bytes), (3, self.nested),
            (4, self.twice), (3, self.schema), (1, self.pattern), (1, self.choices), (8, self.session),
            (6, self.chat), (6, self.topic), (6, self.cancel), (5, self.valid),
        ]  # fmt: skip
        makers = [make for _, make in kinds]
        made = self.rng.choices(makers, [weight for weight, _ in kinds])[0]()
        made.payload = made.payload[: MAX_PAYLOAD_BYTES + 10]
        if made.client is None and self.rng.random() < 0.8:
            made.client = self.rng.choice(CLIENTS)
        if self.rng.random() < 0.15:
            self.add_properties(made)
        return made

    # -- values -------------------------------------------------------------------------------------------------

    def value(self, depth: int = 0) -> Any:
        kind = self.rng.random()
        if depth < 3 and kind < 0.12:
            return [self.value(depth + 1) for _ in range(self.rng.randrange(5))]
        if depth < 3 and kind < 0.24:
            names = [*sorted(KNOWN_KEYS), "", "x", "\0", "__class__"]
            return Pairs((self.rng.choice(names), self.value(depth + 1)) for _ in range(self.rng.randrange(5)))
        return self.rng.choice(self.rng.choice([NUMBERS, NUMBERS, TEXTS, TEXTS, OTHERS]))

    def body(self) -> dict[str, Any]:
        """Return a valid request."""
        return {"prompt": "turn on the light", "max_tokens": self.rng.randint(1, MAX_TOKENS), "temperature": 0.5}

    def sent(self, body: Any, **more: Any) -> Message:
        return Message(text_of(body).encode("utf-8", "surrogatepass"), **more)

    # -- kinds --------------------------------------------------------------------------------------------------

    def valid(self) -> Message:
        return self.sent({**self.body(), "v": 1, "stop": ["a"], "stream": self.rng.random() < 0.5, "seed": 1})

    def noise(self) -> Message:
        size = int(10 ** self.rng.uniform(0, 3.5))
        start = self.rng.choice([b"", b"", b"{", b'{"prompt": "', b"\xef\xbb\xbf", b"\xff\xfe", b"[", b" \n{"])
        kind = self.rng.randrange(3)
        if kind == 0:
            return Message(start + self.rng.randbytes(size))
        if kind == 1:
            return Message(start + "".join(chr(self.rng.randrange(1, 0xD800)) for _ in range(size)).encode())
        return Message(start + bytes([self.rng.randrange(256)]) * (size * self.rng.choice([1, 20])))

    def one_key(self) -> Message:
        body = {**self.body(), self.rng.choice(sorted(KNOWN_KEYS)): self.value()}
        return self.sent(body, is_strict="response_topic" not in body)

    def several_keys(self) -> Message:
        keys = self.rng.sample(sorted(KNOWN_KEYS), self.rng.randint(2, 8))
        body = {**self.body(), **{key: self.value() for key in keys}}
        return self.sent(body, is_strict="response_topic" not in body)

    def broken_bytes(self) -> Message:
        data = bytearray(self.make_valid_or_keyed().payload)
        for _ in range(self.rng.randint(1, 4)):
            at = self.rng.randrange(len(data))
            kind = self.rng.randrange(4)
            if kind == 0:
                data[at] = self.rng.randrange(256)
            elif kind == 1:
                del data[at : at + self.rng.randint(1, 20)]
            elif kind == 2:
                data[at:at] = data[at : at + self.rng.randint(1, 50)]
            else:
                data[at] ^= 1 << self.rng.randrange(8)
            data = data or bytearray(b"{")
        return Message(bytes(data), is_strict=b"topic" not in data)

    def make_valid_or_keyed(self) -> Message:
        return self.rng.choice([self.valid, self.one_key, self.chat])()

    def nested(self) -> Message:
        depth = int(10 ** self.rng.uniform(0, 4.3))
        opening, closing = self.rng.choice([("[", "]"), ('{"a":', "}"), ('[{"prompt":', "}]")])
        inside = Text(
            opening * depth + self.rng.choice(["1", "", '"x"']) + closing * self.rng.choice([depth, depth - 1])
        )
        where = self.rng.choice(["prompt", "messages", "json_schema", "tools", "template_vars", "stop", "nonsense"])
        return self.sent({**self.body(), where: inside})

    def twice(self) -> Message:
        key = self.rng.choice(["prompt", "max_tokens", "id", "v", "messages", "json_schema", "stop", "session"])
        pairs = [*self.body().items(), *((key, self.value()) for _ in range(self.rng.choice([2, 3, 2000])))]
        self.rng.shuffle(pairs)
        return self.sent(Pairs(pairs))

    def pattern(self) -> Message:
        return self.sent({**self.body(), "regex": self.rng.choice([*PATTERNS, self.value()])})

    def choices(self) -> Message:
        rng = self.rng
        many = [f"{self.rng.randrange(10**6)}" for _ in range(int(10 ** rng.uniform(0, 3.5)))]
        found = rng.choice([["on", "off"], many, ["a" * 5000, "a" * 5001], ["", "x"], self.value(), [self.value()]])
        return self.sent({**self.body(), "choices": found})

    def schema(self) -> Message:
        rng = self.rng
        schema = rng.choice([self.any_schema(0), self.any_schema(0), self.bomb()])
        if not isinstance(schema, dict | Text):
            schema = {"enum": [1]}
        return self.sent({**self.body(), "json_schema": schema})

    def any_schema(self, depth: int) -> Any:
        """Return a mostly valid schema."""
        rng = self.rng
        if depth > rng.choice([1, 2, 4]):
            return rng.choice([{}, True, False, {"type": "null"}, {"const": self.value(2)}, {"type": "boolean"}])
        kind = rng.randrange(9)
        if kind == 0:
            names = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
            bounds = {name: rng.choice(NUMBERS) for name in names if rng.random() < 0.4}
            return {"type": rng.choice(["integer", "number"]), **bounds}
        if kind == 1:
            names = ("minLength", "maxLength")
            bounds = {name: rng.choice([0, 1, 5, 3000, 10**6, -1, 2**31, 1.5]) for name in names if rng.random() < 0.5}
            shape = {"pattern": rng.choice(PATTERNS)} if rng.random() < 0.4 else {}
            form = {"format": rng.choice(["date", "email", "ipv6", "uuid", "nonsense"])} if rng.random() < 0.2 else {}
            return {"type": "string", **bounds, **shape, **form}
        if kind == 2:
            names = ("minItems", "maxItems", "uniqueItems", "prefixItems", "contains")
            values = [0, 1, 50, 10**5, 2**40, -1, True, [self.any_schema(depth + 1)], self.any_schema(depth + 1)]
            return {
                "type": "array",
                "items": self.any_schema(depth + 1),
                **{name: rng.choice(values) for name in names if rng.random() < 0.3},
            }
        if kind in (3, 4):
            names = [rng.choice(["a", "b", "", "é", '"', "\n", "$ref", "x" * 200]) for _ in range(rng.randint(0, 6))]
            extra = {"additionalProperties": rng.choice([True, False, self.any_schema(depth + 1)])}
            required = {"required": rng.choice([names, ["missing"], names * 3, "a", [1]])}
            return {
                "type": "object",
                "properties": {name: self.any_schema(depth + 1) for name in names},
                **(extra if rng.random() < 0.5 else {}),
                **(required if rng.random() < 0.5 else {}),
            }
        if kind == 5:
            joined = [self.any_schema(depth + 1) for _ in range(rng.randint(1, 5))]
            return {rng.choice(["anyOf", "allOf", "oneOf"]): joined}
        if kind == 6:
            return {"enum": [self.value(1) for _ in range(rng.choice([1, 3, 20]))]}
        if kind == 7:
            return {"$ref": rng.choice(["#", "#/$defs/a", "#/properties/a", "http://x/y", "#/", "", 3])}
        return {rng.choice(["type", "const", "not", "if", "nonsense", "x-guidance", "$defs"]): self.value(1)}

    def bomb(self) -> Any:
        """Return a small schema that is expensive to compile."""
        rng, size = self.rng, int(10 ** self.rng.uniform(0.3, 2.5))
        begins = ['{"anyOf": [', '{"type": "array", "items": ', '{"type": "object", "properties": {"a": ']
        levels = [rng.randrange(3) for _ in range(size)]
        nested = Text("".join(begins[i] for i in levels) + "{}" + "".join(["]}", "}", "}}"][i] for i in levels[::-1]))
        double: Any = {"type": "integer", "minimum": 3}
        for _ in range(min(size, 8)):
            double = {rng.choice(["allOf", "anyOf", "oneOf"]): [double, double, {"type": "string"}]}
        ranges = [{"anyOf": [{"minimum": i}, {"maximum": i + size}]} for i in range(min(size, 12))]
        return rng.choice([
            nested,
            double,
            {"type": "integer", "multipleOf": rng.choice([9999991, 10**15 + 37, 0.0001, 1e-300, 0, -3, 7])},
            {"const": rng.choice(NUMBERS)},
            {"allOf": ranges},
            {"enum": [f"item {i} {rng.random()}" for i in range(size * 10)]},
            {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}},
             "$ref": "#/$defs/a"},
            {"type": "array", "items": {"$ref": "#"}, "minItems": size},
            {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": size, "maxItems": size * 9},
            {"type": "string", "pattern": rng.choice(PATTERNS), "minLength": size * 10},
            {"type": "object", "patternProperties": {rng.choice(PATTERNS): {"type": "integer"}}, "minProperties": size},
            {"type": "object", "properties": {f"p{i}": {"enum": list(range(20))} for i in range(size * 3)}},
        ])  # fmt: skip

    def session(self) -> Message:
        body: dict[str, Any] = {**self.body(), "session": self.rng.choice(["s", "t", f"s{self.rng.randrange(500)}"])}
        kind = self.rng.randrange(5)
        if kind == 0:
            body["end_session"] = True
        elif kind == 1:
            body = {"session": body["session"], "end_session": True}
        elif kind == 2:
            body["session"] = self.value()
        elif kind == 3:
            body["prompt"] = "word " * self.rng.choice([1, 100, 400])
        return self.sent(body)

    def chat(self) -> Message:
        rng = self.rng
        roles = ["user", "system", "assistant", "tool", "", "\0", "x" * 300, self.value(2)]
        contents = [
            "hello",
            "",
            None,
            [{"type": "text", "text": "a"}],
            [{"type": "image"}],
            "<eos>" * 20,
            self.value(2),
        ]
        messages: Any = [
            {"role": rng.choice(roles), "content": rng.choice(contents)}
            for _ in range(rng.choice([0, 1, 1, 2, 5, 200]))
        ]
        body: dict[str, Any] = {"messages": messages, "max_tokens": rng.randint(1, MAX_TOKENS)}
        if rng.random() < 0.3:
            body["tools"] = rng.choice([[TOOL], [TOOL] * 40, [self.value()], self.value()])
        if rng.random() < 0.3:
            names = ["enable_thinking", "messages", "bos_token", "", "a b", "__class__", "range"]
            body["template_vars"] = rng.choice([{rng.choice(names): self.value()}, self.value()])
        if rng.random() < 0.2:
            body[rng.choice(["system", "raw"])] = rng.choice(["be brief", True, self.value()])
        return self.sent(body)

    def topic(self) -> Message:
        made = self.valid()
        topic = self.rng.choice(TOPICS)
        if self.rng.random() < 0.5 and topic and not set(topic) & set("#+\n"):  # else the broker refuses it
            made.reply = topic
        else:
            made = self.sent({**self.body(), "response_topic": topic})
        if self.rng.random() < 0.3:
            made.client = self.rng.choice(["C", "a b", "x" * 33, "pool", "ü", "a/b", ""])
        made.is_strict = False
        return made

    def cancel(self) -> Message:
        payload = self.rng.choice([b"", b"PRESS", b"x", self.rng.randbytes(self.rng.randrange(40)), b"\xff" * 4000])
        client = self.rng.choice([*CLIENTS, *CLIENTS, None, "X", ""])
        return Message(payload, action="cancel", client=client, is_strict=False)

    def add_properties(self, made: Message) -> None:
        """Add random MQTT properties to a message."""
        rng = self.rng
        if rng.random() < 0.5:
            made.correlation = rng.randbytes(rng.choice([0, 1, 16, 130, 4000, MAX_CORRELATION_BYTES]))
        if rng.random() < 0.3:
            made.expiry_s = rng.choice([0, 1, 60, 2**31, 2**32 - 1])
            made.is_strict &= made.expiry_s > 1
        if rng.random() < 0.4:
            made.user = [
                (rng.choice(["a", "", "ü", "x" * 500]), "b" * rng.randrange(50)) for _ in range(rng.randrange(40))
            ]
        if rng.random() < 0.3:
            made.content_type = rng.choice(["application/json", "", "text/plain", "x" * 300, "ü"])
        if rng.random() < 0.3:
            made.is_text = rng.random() < 0.5
