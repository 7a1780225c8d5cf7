"""Random small models of any architecture, made with transformers, and the comparisons that all parity tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from tiny import tokenizer_json

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.runtime.memory_plan import PREFILL_CHUNK

torch = pytest.importorskip("torch", reason="needs pip install 'edgelm[distill]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'edgelm[distill]'")

TOLERANCE: Final = 1e-3
STEPS: Final = 20
PROMPT: Final = 150
"""Tokens: more than every window and every original context of the small models."""

BASE: Final = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
"""The default configuration of the small models."""


def check(
    family: str,
    options: dict[str, Any],
    folder: Path,
    export: Callable[..., Path],
    *,
    dtype: str = "float32",
    shards: int = 1,
    start: int = 40,
) -> None:
    """Make a model, export it and compare; `start` is how many prompt tokens precede the decoded steps."""
    checkpoint, network = folder / "model", random_model(family, **options)
    if dtype != "float32" or shards > 1:
        size = sum(p.numel() for p in network.parameters()) * getattr(torch, dtype).itemsize
        network = network.to(getattr(torch, dtype))
        write(network, checkpoint, max_shard_size=size // shards)
        assert len([*checkpoint.glob("*.safetensors")]) >= shards
        network = reference(checkpoint)
    else:
        write(network, checkpoint)
    compare(network, export(checkpoint, quant="fp32"), start=start)


def make(family: str, options: dict[str, Any], folder: Path, export: Callable[..., Path]) -> tuple[Any, Path]:
    """Make a model in float32 and export it; return the network and the bundle."""
    network = random_model(family, **options)
    return network, export(write(network, folder / "model"), quant="fp32")


def random_model(family: str, *, seed: int = 0, **options: Any) -> Any:
    """Build a transformers network with random weights, norms and biases included."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **{**BASE, **options})
    network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    around_zero = family.startswith("gemma")  # its norms add 1 to the stored factors
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                low = 0.6 if "norm" in name and not around_zero else -0.4
                parameter.copy_(torch.rand_like(parameter) * 0.8 + low)
            else:
                # a model with a large tied head repeats itself
                width = parameter.shape[1] ** -0.5 * (3 if "lm_head" in name else 1)
                parameter.copy_(torch.randn_like(parameter) * width)
    return network


def write(network: Any, path: Path, **options: Any) -> Path:
    """Save a network as a checkpoint that can be exported."""
    network.save_pretrained(path, **options)
    (path / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    return path


def reference(checkpoint: Path) -> Any:
    """Read a checkpoint with transformers. Its fused attention ignores soft caps, so eager attention is used."""
    network = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, torch_dtype=torch.float32, attn_implementation="eager"
    )
    return network.eval()


def reference_logits(network: Any, tokens: Sequence[int]) -> np.ndarray:
    """Logits after every token, float32 [n, V], in one pass."""
    with torch.no_grad():
        return network(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()


def logits_of(model: edgelm.Model, tokens: Sequence[int], pieces: int = PREFILL_CHUNK) -> np.ndarray:
    """Logits after every token, prefilled in pieces of that many tokens into the row that scoring uses."""

    def run(engine: Any) -> np.ndarray:
        inputs, total = np.array(tokens, np.int64), len(tokens)
        starts = range(0, total, pieces)
        row, prefill = engine.scratch_row, engine.runner.prefill
        return np.concatenate(
            [prefill(row, inputs[at : at + pieces], at, all_logits=True, final_length=total) for at in starts]
        )

    return model.worker.call(run)


def random_prompt(vocab: int, length: int = PROMPT, seed: int = 1) -> list[int]:
    """Random token ids without special tokens."""
    return np.random.default_rng(seed).integers(2, vocab, length).tolist()


def compare(network: Any, bundle: Path, *, start: int = 40, prompt_tokens: int = PROMPT) -> None:
    """Compare logits at every position of a prompt, and greedy steps after its first `start` tokens."""
    vocab = network.config.vocab_size
    prompt = random_prompt(vocab, prompt_tokens)
    with edgelm.load(bundle, threads=1, max_batch=1) as model:
        expected = reference_logits(network, prompt)
        assert 0.5 < expected.std() < 5  # neither flat nor dominated by rounding
        found = logits_of(model, prompt)
        assert np.abs(found - expected).max() < TOLERANCE
        assert np.abs(logits_of(model, prompt, 67) - expected).max() < TOLERANCE
        answer = model.generate(tokens=prompt[:start], max_tokens=STEPS, temperature=0.0, ignore_eos=True, logprobs=1)
        whole = prompt[:start] + list(answer.tokens)
        steps = step_logits(network, whole, start)
        assert list(answer.tokens) == steps.argmax(axis=1).tolist()
        chosen = torch.log_softmax(torch.tensor(steps), -1)[range(STEPS), list(answer.tokens)].numpy()
        assert np.abs(chosen - [entry.logprob for entry in answer.logprobs]).max() < TOLERANCE


def compare_chunks(network: Any, bundle: Path) -> None:
    """Compare a prompt of several chunks with one pass over all of it."""
    prompt = random_prompt(network.config.vocab_size, 2 * PREFILL_CHUNK + 37)
    expected = reference_logits(network, prompt)
    with edgelm.load(bundle, threads=1, max_batch=1) as model:
        for pieces in (PREFILL_CHUNK, len(prompt), 100):
            assert np.abs(logits_of(model, prompt, pieces) - expected).max() < TOLERANCE
        assert model.generate(tokens=prompt, max_tokens=1, ignore_eos=True).tokens == (int(expected[-1].argmax()),)


def compare_batch(bundle: Path, lengths: Sequence[int] = (70, 3, 64, 31, 150, 63, 1, 50)) -> None:
    """Answer prompts of these lengths together and one by one; compare tokens and log-probabilities."""

    def ask(length: int) -> edgelm.Completion:
        prompt = random_prompt(vocab, length, seed=length)
        return model.generate(tokens=prompt, max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=1)

    vocab = open_bundle(bundle).manifest.vocab_size
    with edgelm.load(bundle, threads=1, max_batch=4) as model:
        alone = [ask(length) for length in lengths]
        with ThreadPoolExecutor(len(lengths)) as threads:
            together = list(threads.map(ask, lengths))
    check_alike(together, alone)


def compare_reuse(bundle: Path, lengths: Sequence[int] = (40, 63, 64, 66, 90, 50, 120, 70)) -> None:
    """Answer prompts with a common start, with and without prefix cache; compare tokens and log-probabilities."""
    prompt = random_prompt(open_bundle(bundle).manifest.vocab_size, max(lengths))
    answers = []
    for size in (0, 64):
        with edgelm.load(bundle, threads=1, max_batch=1, prefix_cache_mb=size) as model:
            answers.append(
                [model.generate(tokens=prompt[:n], max_tokens=8, ignore_eos=True, logprobs=1) for n in lengths]
            )
    check_alike(*answers)
    assert not any(answer.usage.cached_tokens for answer in answers[0])
    assert sum(answer.usage.cached_tokens for answer in answers[1]) > sum(lengths) // 2


def compare_guesses(bundle: Path, lengths: Sequence[int] = (50, 58, 62, 63, 64, 65)) -> None:
    """Answer with correct draft tokens, and without; compare tokens and log-probabilities."""
    prompt = random_prompt(open_bundle(bundle).manifest.vocab_size, max(lengths))
    answers: list[list[edgelm.Completion]] = []
    for speculation in (False, True):
        with edgelm.load(bundle, threads=1, max_batch=1, prefix_cache_mb=0, speculation=speculation) as model:
            drafter = model.worker._engine._speculator
            if drafter is not None:
                known = {n: np.array([*prompt[:n], *answers[0][i].tokens]) for i, n in enumerate(lengths)}
                drafter.propose = partial(following, known)
            answers.append(
                [model.generate(tokens=prompt[:n], max_tokens=24, ignore_eos=True, logprobs=1) for n in lengths]
            )
    check_alike(*answers)


def check_alike(ones: Sequence[edgelm.Completion], others: Sequence[edgelm.Completion]) -> None:
    """Compare answers: the same tokens and log-probabilities."""
    for one, other in zip(ones, others, strict=True):
        assert one.tokens == other.tokens
        worth = [[entry.logprob for entry in answer.logprobs or ()] for answer in (one, other)]
        np.testing.assert_allclose(*worth, atol=1e-4)


def following(known: Mapping[int, np.ndarray], _: Any, tokens: np.ndarray, most: int, __: Any) -> np.ndarray:
    """Return up to 7 draft tokens from the known sequence that starts with `tokens`; each is longer than its key."""
    fits = [each for n, each in known.items() if n < len(tokens) and np.array_equal(each[: len(tokens)], tokens)]
    return fits[0][len(tokens) :][: max(min(7, most), 0)] if fits else tokens[:0]


def step_logits(network: Any, tokens: Sequence[int], start: int) -> np.ndarray:
    """Logits that chose each token from `start` on, [n - start, V], as passes over all before it give them.

    One pass does for all of them, but where the length of a sequence changes how its positions are embedded.
    """
    options = getattr(network.config, "rope_scaling", None) or getattr(network.config, "rope_parameters", None) or {}
    if "long_factor" not in options:
        return reference_logits(network, tokens)[start - 1 : -1]
    return np.stack([reference_logits(network, tokens[:end])[-1] for end in range(start, len(tokens))])
