"""Answers that match a JSON schema: python examples/json_schema.py [BUNDLE] [SENTENCE].

Only tokens that continue valid JSON are sampled: every complete answer matches SCHEMA, with keys in its order.
"""

import sys

import edgelm

SCHEMA = {
    "type": "object",
    "properties": {
        "intent": {"enum": ["PlayMusic", "AddToPlaylist"]},
        "slots": {
            "type": "object",
            "properties": {name: {"type": "string"} for name in ("genre", "artist", "service")},
            "additionalProperties": False,
        },
    },
    "required": ["intent", "slots"],
    "additionalProperties": False,
}

bundle = sys.argv[1] if len(sys.argv) > 1 else "builtin"
sentence = sys.argv[2] if len(sys.argv) > 2 else "play some jazz by Miles Davis on spotify"

with edgelm.load(bundle) as lm:
    done = lm.generate(sentence, json_schema=SCHEMA, max_tokens=200)
    if done.finish_reason != "stop":
        raise SystemExit(f"the answer is not complete ({done.finish_reason}): {done.text}")
    print(done.json["intent"], done.json["slots"])
