"""Load a bundle and stream an answer: python examples/generate.py [BUNDLE] [PROMPT]."""

import sys

import edgelm

bundle = sys.argv[1] if len(sys.argv) > 1 else "builtin"
prompt = sys.argv[2] if len(sys.argv) > 2 else "play some jazz by Miles Davis on spotify"

try:
    model = edgelm.load(bundle)
except edgelm.EdgelmError as error:
    raise SystemExit(str(error)) from error

with model as lm:
    for chunk in lm.stream(prompt, max_tokens=128):
        print(chunk.delta, end="", flush=True)
        if chunk.completion is not None:
            timing = chunk.completion.timing
            print(f"\nfirst token {timing.ttft_ms:.1f} ms, {timing.tok_s:.0f} tokens/s", file=sys.stderr)
