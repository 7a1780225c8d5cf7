"""Turn sentences into calls: echo "what is the weather in Oslo" | python examples/intent_router.py."""

import sys

import edgelm


def play_music(**slots: object) -> str:
    """Stand in for your player."""
    return f"playing {slots}"


def get_weather(**slots: object) -> str:
    """Stand in for your weather source."""
    return f"looking up the weather for {slots}"


HANDLERS = {"PlayMusic": play_music, "GetWeather": get_weather}

with edgelm.load("builtin") as lm:
    for line in sys.stdin:
        frame = lm.generate(line.strip(), max_tokens=128).json
        handler = HANDLERS.get(frame["intent"]) if isinstance(frame, dict) else None
        print(handler(**frame["slots"]) if handler else f"no handler for {frame}")
