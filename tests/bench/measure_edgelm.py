"""One side of peers.py: measures an edgelm bundle through the public API.

Usage: python measure_edgelm.py BUNDLE THREADS PROMPT_TOKENS NEW_TOKENS REPEATS. Prints one JSON object.
"""

import json
import sys
import time

import numpy as np

import edgelm


def main() -> None:
    bundle, (threads, prompt_tokens, new_tokens, repeats) = sys.argv[1], map(int, sys.argv[2:])
    started = time.perf_counter()
    # Random weights repeat themselves, so guesses would be right more often than in any real answer.
    with edgelm.load(bundle, threads=threads, context=prompt_tokens + new_tokens, speculation=False) as model:
        load_s = time.perf_counter() - started
        # A prompt of its own each time: a repeated one would not be computed again.
        prompts = np.random.default_rng(0).integers(
            3, model.manifest.vocab_size, [repeats + 1, prompt_tokens], dtype=np.int32
        )
        runs = []
        for prompt in prompts:
            done = model.generate(tokens=prompt.tolist(), max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            assert (done.usage.completion_tokens, done.usage.cached_tokens) == (new_tokens, 0)
            prefill = prompt_tokens / (done.timing.ttft_ms / 1000)
            runs.append({"prefill_tok_s": prefill, "decode_tok_s": done.timing.tok_s})
    print(json.dumps({"version": edgelm.__version__, "load_s": load_s, "runs": runs[1:]}))  # the first warmed up


if __name__ == "__main__":
    main()
