"""What is measured of every peer, in the same words: a JSON job on the command line, a JSON object on stdout.

A peer's script gives `run` a class. Its constructor takes the job and loads the model; it has `version`, `vocab_size`,

- `answer(prompt, count)`: greedy; the seconds to the first token, and those of the other count - 1
- `warm(system, questions)`: asks the last question first, then the others; the seconds to each one's first token after
  system + question, the system prompt known; absent where a peer computes every prompt from its start
- `streams(prompts, count)`: answers to prompts int32 [b, n] at once, count tokens each
- `logits(documents, out)`: writes logits after every token, all documents behind each other, to out: float32 [n, V]

Random weights would end an answer anywhere: no side stops before `count`. This file needs nothing but numpy.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

MEMORY_PROMPT, MEMORY_NEW, READY_PROMPT = 256, 64, 16


def memory():
    """Return MB (10^6 bytes): memory that cannot be dropped, pages of mapped files that can, both, and the peak."""
    text = Path("/proc/self/status").read_text() + Path("/proc/self/smaps_rollup").read_text()
    fields = {line.split(":")[0]: line.split() for line in text.splitlines()}
    resident, anonymous, peak = (int(fields[name][1]) * 1.024e-3 for name in ("Rss", "Anonymous", "VmHWM"))
    return {
        "private_mb": anonymous,
        "mapped_mb": resident - anonymous,
        "resident_mb": resident,
        "peak_mb": peak,
    }


def random_prompts(side, job):
    """Return a function that draws prompts, each another: nothing is known when it is not meant to be."""
    generator = np.random.default_rng(job["seed"])
    return lambda *shape: generator.integers(3, side.vocab_size, shape, dtype=np.int32)


def measure_answers(side, job):
    """Prefill and decode after prompts of some lengths."""
    draw = random_prompts(side, job)
    count = job["new_tokens"]
    found = {}
    for length in job["lengths"]:
        side.answer(draw(length), 2)  # warms up
        runs = [side.answer(draw(length), count) for _ in range(job["repeats"])]
        found[str(length)] = [
            {"prefill_tok_s": length / first, "decode_tok_s": (count - 1) / rest} for first, rest in runs
        ]
    return {"answers": found}


def measure_warm(side, job):
    """The first token of a known system prompt and a new question, and of a prompt as long that is all new."""
    draw = random_prompts(side, job)
    system, repeats = draw(job["known"]), job["repeats"] + 1  # the first warms up
    questions = draw(repeats + 1, job["new"])
    cold = [1e3 * side.answer(draw(job["known"] + job["new"]), 1)[0] for _ in range(repeats)]
    if not hasattr(side, "warm"):
        return {"cold_ms": cold[1:], "warm_ms": cold[1:], "reuse": False}
    warm = [1e3 * seconds for seconds in side.warm(system, questions)]
    return {"cold_ms": cold[1:], "warm_ms": warm[1:], "reuse": True}


def measure_streams(side, job):
    """Tokens a second of all streams together, their prompts' computing included."""
    draw = random_prompts(side, job)
    count, length = job["new_tokens"], job["stream_prompt"]
    found = {}
    for streams in job["streams"]:
        side.streams(draw(streams, length), 2)  # warms up
        rates = []
        for _ in range(job["repeats"]):
            prompts = draw(streams, length)
            started = time.perf_counter()
            side.streams(prompts, count)
            rates.append(streams * count / (time.perf_counter() - started))
        found[str(streams)] = rates
    return {"streams": found}


def measure_memory(side, job):
    """Load until the first token; memory after one answer."""
    draw = random_prompts(side, job)
    first_s, _ = side.answer(draw(READY_PROMPT), 1)
    side.answer(draw(MEMORY_PROMPT), MEMORY_NEW)
    return {"first_s": first_s, **memory()}


def measure_logits(side, job):
    """Logits of given documents."""
    corpus = np.load(job["tokens"])
    documents = np.split(corpus["tokens"], np.cumsum(corpus["lengths"])[:-1])
    out = np.lib.format.open_memmap(job["out"], "w+", np.float32, (len(corpus["tokens"]), side.vocab_size))
    side.logits(documents, out)
    out.flush()
    return {}


MEASURES = {
    "answers": measure_answers,
    "warm": measure_warm,
    "streams": measure_streams,
    "memory": measure_memory,
    "logits": measure_logits,
}


def run(side_class):
    """Do the job of the command line."""
    job = json.loads(sys.argv[1])
    started = time.perf_counter()
    side = side_class(job)
    load_s = time.perf_counter() - started
    print(json.dumps({"version": side.version, "load_s": load_s, **MEASURES[job["what"]](side, job)}))
