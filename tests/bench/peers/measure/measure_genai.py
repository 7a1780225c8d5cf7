"""onnxruntime-genai's side, run by an interpreter that has it: a folder that its builder wrote."""

import json
import time
from pathlib import Path

import job as protocol
import numpy as np
import onnxruntime_genai as og


class Folder:
    version = og.__version__

    def __init__(self, job):
        decoder = json.loads((Path(job["model"]) / "genai_config.json").read_text(encoding="utf-8"))["model"]
        self.vocab_size = decoder["vocab_size"]
        config = og.Config(job["model"])
        if job["threads"]:  # else as it comes: genai chooses
            options = decoder["decoder"]["session_options"] | {"intra_op_num_threads": job["threads"]}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = og.Model(config)

    def generator(self, length, streams=1):
        params = og.GeneratorParams(self.model)
        # min_length keeps a random model from ending early.
        params.set_search_options(do_sample=False, min_length=length, max_length=length, batch_size=streams)
        return og.Generator(self.model, params)

    def answer(self, prompt, count):
        generator = self.generator(len(prompt) + count)
        started = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(count - 1):
            generator.generate_next_token()
        ended = time.perf_counter()
        assert len(generator.get_sequence(0)) == len(prompt) + count
        return first - started, ended - first

    def warm(self, system, questions):
        generator = self.generator(len(system) + len(questions[0]) + 1)
        generator.append_tokens(np.concatenate([system, questions[-1]]))
        times = []
        for question in questions[:-1]:
            started = time.perf_counter()
            generator.rewind_to(len(system))
            generator.append_tokens(question)
            generator.generate_next_token()
            times.append(time.perf_counter() - started)
        return times

    def streams(self, prompts, count):
        generator = self.generator(prompts.shape[1] + count, len(prompts))
        generator.append_tokens(prompts)
        for _ in range(count):
            generator.generate_next_token()
        assert len(generator.get_sequence(len(prompts) - 1)) == prompts.shape[1] + count

    def logits(self, documents, out):
        done = 0
        for ids in documents:
            generator = self.generator(len(ids) + 1)
            generator.append_tokens(ids.astype(np.int32))
            out[done : done + len(ids)] = generator.get_output("logits")[0]
            done += len(ids)


if __name__ == "__main__":
    protocol.run(Folder)
