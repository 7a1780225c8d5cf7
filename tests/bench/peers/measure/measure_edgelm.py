"""edgelm's side: a bundle through the public API."""

import threading

import job as protocol
import numpy as np

from edgelm import __version__, load
from edgelm.runtime.memory_plan import PREFILL_CHUNK


class Bundle:
    version = __version__

    def __init__(self, job):
        # Random weights repeat themselves, so guesses would be right more often than in any real answer.
        self.model = load(
            job["model"],
            threads=job["threads"],
            context=job["context"],
            max_batch=max(job.get("streams", [1])),
            speculation=False,
        )
        self.vocab_size = self.model.manifest.vocab_size

    def ask(self, prompt, count, cached=0):
        done = self.model.generate(tokens=prompt.tolist(), max_tokens=count, temperature=0.0, ignore_eos=True)
        assert done.usage.completion_tokens == count
        # A small vocabulary lets random prompts begin alike.
        assert cached <= done.usage.cached_tokens <= cached + 4, f"{done.usage.cached_tokens} tokens were known"
        return done.timing

    def answer(self, prompt, count):
        timing = self.ask(prompt, count)
        return timing.ttft_ms / 1e3, (timing.total_ms - timing.ttft_ms) / 1e3

    def warm(self, system, questions):
        self.ask(np.concatenate([system, questions[-1]]), 1)
        return [self.ask(np.concatenate([system, each]), 1, len(system)).ttft_ms / 1e3 for each in questions[:-1]]

    def streams(self, prompts, count):
        threads = [threading.Thread(target=self.ask, args=(prompt, count)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def logits(self, documents, out):
        row = self.model.worker.call(lambda engine: engine.scratch_row)  # the one for scoring
        done = 0
        for ids in documents:
            for at in range(0, len(ids), PREFILL_CHUNK):
                piece = ids[at : at + PREFILL_CHUNK].astype(np.int64)
                out[done : done + len(piece)] = self.model.worker.call(
                    lambda engine, piece=piece, at=at: engine.runner.prefill(row, piece, at, all_logits=True)
                )
                done += len(piece)


if __name__ == "__main__":
    protocol.run(Bundle)
