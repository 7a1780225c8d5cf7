"""One side of peers.py, run by an interpreter that has onnxruntime-genai: measures a folder it built.

Usage: python measure_genai.py MODEL THREADS PROMPT_TOKENS NEW_TOKENS REPEATS. THREADS 0 leaves the choice
to genai. Prints one JSON object.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    model_path, (threads, prompt_tokens, new_tokens, repeats) = sys.argv[1], map(int, sys.argv[2:])
    decoder = json.loads((Path(model_path) / "genai_config.json").read_text())["model"]
    options = decoder["decoder"]["session_options"] | {"intra_op_num_threads": threads}
    config = og.Config(model_path)
    if threads:
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    started = time.perf_counter()
    model = og.Model(config)
    load_s = time.perf_counter() - started
    prompts = np.random.default_rng(0).integers(3, decoder["vocab_size"], [repeats + 1, prompt_tokens], dtype=np.int32)
    length = prompt_tokens + new_tokens
    runs = []
    for prompt in prompts:
        params = og.GeneratorParams(model)
        # min_length keeps a random model from ending early.
        params.set_search_options(do_sample=False, min_length=length, max_length=length, batch_size=1)
        generator = og.Generator(model, params)
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        assert len(generator.get_sequence(0)) == length
        prefill, decode = prompt_tokens / (first - started), (new_tokens - 1) / (ended - first)
        runs.append({"prefill_tok_s": prefill, "decode_tok_s": decode})
        del generator
    print(json.dumps({"version": og.__version__, "load_s": load_s, "runs": runs[1:]}))  # the first warmed up


if __name__ == "__main__":
    main()
