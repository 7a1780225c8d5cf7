"""Call a function for each sentence: examples/intent_router.py "what is the weather in Oslo", or sentences on stdin."""

import sys

import edgelm


def play_music(**slots: object) -> str:
    """Replace this with your player."""
    return f"playing {slots}"


def get_weather(**slots: object) -> str:
    """Replace this with your weather source."""
    return f"looking up the weather for {slots}"


HANDLERS = {"PlayMusic": play_music, "GetWeather": get_weather}

if not sys.argv[1:] and sys.stdin.isatty():
    print("one command per line, such as: play some jazz (Ctrl-D ends)", file=sys.stderr)

with edgelm.load("builtin") as lm:
    for line in sys.argv[1:] or sys.stdin:
        frame = lm.generate(line.strip(), max_tokens=128).json
        handler = HANDLERS.get(frame["intent"]) if isinstance(frame, dict) else None
        print(handler(**frame["slots"]) if handler else f"no handler for {frame}")
