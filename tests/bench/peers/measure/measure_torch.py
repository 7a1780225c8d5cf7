"""transformers' side and optimum's, whose models have the same `generate`; both compute every prompt from its start.

The job's `kind` is "optimum" (a folder of its export) or "transformers" (the checkpoint, in the job's `dtype`). A job
"sample" writes documents that the model makes up at temperature 1.
"""

import json
import sys
import time
from importlib.metadata import version

import job as protocol
import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList
from transformers import __version__ as transformers_version


class Timed(list):
    """A stopping criterion that stops nothing and notes when each token was there."""

    def __call__(self, ids, scores, **_):
        self.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool)


class Network:
    version = transformers_version

    def __init__(self, job):
        torch.set_num_threads(job["threads"])
        if job["kind"] == "optimum":
            import onnxruntime
            from optimum.onnxruntime import ORTModelForCausalLM

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = job["threads"]
            self.model = ORTModelForCausalLM.from_pretrained(job["model"], session_options=options)
            self.version = version("optimum-onnx")
        else:
            dtype = getattr(torch, job["dtype"])
            self.model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, use_safetensors=True).eval()
        self.vocab_size = self.model.config.vocab_size
        self.model.generation_config = GenerationConfig(pad_token_id=0)  # nothing ends an answer

    def generate(self, prompts, count, **options):
        """Return ids [b, n + count], and when each new token was there."""
        ids, times = torch.from_numpy(prompts.astype(np.int64)), Timed()
        options = {"do_sample": False} | options
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                stopping_criteria=StoppingCriteriaList([times]),
                **options,
            )
        assert out.shape[1] == prompts.shape[1] + count
        return out, times

    def answer(self, prompt, count):
        started = time.perf_counter()
        _, times = self.generate(prompt[None], count)
        return times[0] - started, times[-1] - times[0]

    def streams(self, prompts, count):
        self.generate(prompts, count)

    def logits(self, documents, out):
        done = 0
        for ids in documents:
            tokens = torch.from_numpy(ids.astype(np.int64))[None]
            with torch.inference_mode():
                logits = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            out[done : done + len(ids)] = logits[0].float().numpy()
            done += len(ids)

    def sample(self, job):
        """Write documents made up at temperature 1, after the job's first token."""
        torch.manual_seed(job["seed"])
        count, length = job["documents"], job["length"]
        out, _ = self.generate(np.full((count, 1), job["first"]), length - 1, do_sample=True, temperature=1.0, top_k=0)
        np.savez(job["out"], tokens=out.numpy().ravel(), lengths=np.full(count, length))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if asked["kind"] == "optimum":
        import optimum.onnxruntime  # noqa: F401  imports are measured apart from loading
    if asked["what"] == "sample":
        Network(asked).sample(asked)
        print("{}")
    else:
        protocol.run(Network)
