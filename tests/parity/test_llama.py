"""Logits of exported Llamas against transformers, over shapes and options that real checkpoints have or may have."""

from __future__ import annotations

import numpy as np
import pytest

import edgelm
from edgelm.session import PREFILL_CHUNK

torch = pytest.importorskip("torch", reason="needs pip install 'edgelm[distill]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'edgelm[distill]'")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

TOLERANCE = 1e-3
STEPS = 20
LLAMA3 = (
    ("rope_type", "llama3"),
    ("factor", 8.0),
    ("low_freq_factor", 1.0),
    ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 64),
)
SHAPES = {
    "tied": {},
    "untied": {"tied": False},
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True, "tied": False},
    "all-biases-odd-heads": {"attention_bias": True, "mlp_bias": True, "head_size": 24, "heads": 3, "kv_heads": 1},
    "every-head-its-own-key": {"kv_heads": 4},
    "one-key-head": {"kv_heads": 1},
    "head-8": {"head_size": 8},
    "head-8-of-hidden": {"heads": 8, "kv_heads": 4},
    "head-24": {"head_size": 24},
    "head-40": {"head_size": 40, "heads": 6, "kv_heads": 3},
    "head-64": {"head_size": 64, "heads": 2, "kv_heads": 1},
    "head-2": {"head_size": 2},
    "hidden-40": {"hidden": 40, "heads": 5, "kv_heads": 5, "mlp": 52},
    "hidden-50-mlp-172": {"hidden": 50, "heads": 5, "kv_heads": 1, "mlp": 172},
    "one-layer": {"layers": 1},
    "odd-vocabulary": {"vocab": 509, "tied": False},
    "theta": {"theta": 500000.0},
    "small-theta": {"theta": 100.0, "head_size": 8},
    "linear": {"scaling": (("rope_type", "linear"), ("factor", 4.0))},
    "linear-old-name": {"scaling": (("type", "linear"), ("factor", 2.5)), "head_size": 8},
    "llama3": {"scaling": LLAMA3, "theta": 500000.0},
    "llama3-padded-heads": {"scaling": LLAMA3, "head_size": 40},
    "bfloat16": {"dtype": "bfloat16"},
    "float16-untied": {"dtype": "float16", "tied": False},
    "sharded": {"shards": 3, "dtype": "bfloat16"},
    "sharded-float32-untied": {"shards": 2, "tied": False},
}


def reference(checkpoint):
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32).eval()


def reference_logits(network, tokens):
    with torch.no_grad():
        return network(torch.tensor([tokens])).logits[0].numpy()


def logits_of(model, tokens, pieces=PREFILL_CHUNK):
    """Logits at every position, prefilled in pieces of that many tokens into the row that scoring uses."""

    def run(engine):
        parts = [
            engine.session.prefill(engine.max_batch, np.array(tokens[at : at + pieces], np.int64), at, every=True)
            for at in range(0, len(tokens), pieces)
        ]
        return np.concatenate(parts)

    return model.worker.call(run)


@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
def test_float32_logits_and_greedy_steps_match_transformers(fields, tiny_checkpoint, export_to_cache):
    checkpoint = tiny_checkpoint(**fields)
    network = reference(checkpoint)
    vocab = network.config.vocab_size
    prompt = np.random.default_rng(1).integers(2, vocab, 150).tolist()
    with edgelm.load(export_to_cache(checkpoint, quant="fp32"), threads=1, max_batch=1) as model:
        expected = reference_logits(network, prompt)
        assert expected.std() > 0.5  # neither flat nor dead
        assert np.abs(logits_of(model, prompt) - expected).max() < TOLERANCE
        answer = model.generate(tokens=prompt[:40], max_tokens=STEPS, temperature=0.0, ignore_eos=True, logprobs=1)
        whole = prompt[:40] + list(answer.tokens)
        steps = reference_logits(network, whole)[39:-1]
        assert list(answer.tokens) == steps.argmax(axis=1).tolist()
        chosen = torch.log_softmax(torch.tensor(steps), -1)[range(STEPS), list(answer.tokens)].numpy()
        assert np.abs(chosen - [entry.logprob for entry in answer.logprobs]).max() < TOLERANCE


def test_a_prompt_in_chunks_equals_one_pass_and_transformers(tiny_checkpoint, export_to_cache):
    checkpoint = tiny_checkpoint(context=1024, scaling=LLAMA3, head_size=24)
    prompt = np.random.default_rng(2).integers(2, 331, 2 * PREFILL_CHUNK + 37).tolist()
    expected = reference_logits(reference(checkpoint), prompt)
    with edgelm.load(export_to_cache(checkpoint, quant="fp32"), threads=1, max_batch=1) as model:
        for pieces in (PREFILL_CHUNK, len(prompt), 100):
            assert np.abs(logits_of(model, prompt, pieces) - expected).max() < TOLERANCE
        assert model.generate(tokens=prompt, max_tokens=1, ignore_eos=True).tokens == (int(expected[-1].argmax()),)
