"""Turn sentences into calls: python examples/intent_router.py "what is the weather in Oslo", or lines on stdin."""

import sys

import edgelm


def play_music(**slots: object) -> str:
    """Stand in for your player."""
    return f"playing {slots}"


def get_weather(**slots: object) -> str:
    """Stand in for your weather source."""
    return f"looking up the weather for {slots}"


HANDLERS = {"PlayMusic": play_music, "GetWeather": get_weather}

if not sys.argv[1:] and sys.stdin.isatty():
    print("a command a line, such as: play some jazz (Ctrl-D ends)", file=sys.stderr)

with edgelm.load("builtin") as lm:
    for line in sys.argv[1:] or sys.stdin:
        frame = lm.generate(line.strip(), max_tokens=128).json
        handler = HANDLERS.get(frame["intent"]) if isinstance(frame, dict) else None
        print(handler(**frame["slots"]) if handler else f"no handler for {frame}")
