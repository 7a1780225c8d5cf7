"""A real pretrained Llama: logits, greedy text and perplexity against transformers, and what int8 and int4 cost."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

import edgelm
from edgelm.text.documents import split_documents

torch = pytest.importorskip("torch", reason="needs pip install 'edgelm[distill]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'edgelm[distill]'")
pytestmark = pytest.mark.usefixtures("one_torch_thread")

PROMPT = "Once upon a time"
POSITIONS = 200
BATCH = 8


@pytest.fixture(scope="module")
def network(stories_checkpoint):
    return transformers.AutoModelForCausalLM.from_pretrained(stories_checkpoint, torch_dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(stories_checkpoint):
    return transformers.AutoTokenizer.from_pretrained(stories_checkpoint)


@pytest.fixture(scope="module")
def documents(shared):
    file = shared / "data" / "tinystories" / "dev.txt"
    if not file.is_file():
        pytest.skip(f"{file} is absent: set EDGELM_SHARED to a folder that has data/tinystories")
    return file


@pytest.fixture(scope="module")
def reference_quality(network, tokenizer, documents):
    """Perplexity, bits a byte and number of the tokens after each document's <s>, documents cut at the context."""
    context = network.config.max_position_embeddings
    texts = split_documents(documents.read_text("utf-8"))
    rows = [[1, *tokenizer.encode(text, add_special_tokens=False)][:context] for text in texts]
    size = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in rows)
    nats, count = 0.0, 0
    for at in range(0, len(rows), BATCH):
        batch = rows[at : at + BATCH]
        ids = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
        for i, row in enumerate(batch):
            ids[i, : len(row)] = torch.tensor(row)  # padded on the right, invisible to earlier positions
        with torch.no_grad():
            scores = torch.log_softmax(network(ids).logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0].double()
        nats -= sum(float(scores[i, : len(row) - 1].sum()) for i, row in enumerate(batch))
        count += sum(len(row) - 1 for row in batch)
    return math.exp(nats / count), nats / math.log(2) / size, count


def evaluated(bundle, documents):
    command = [sys.executable, "-m", "edgelm", "eval", str(bundle), "--text", str(documents), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_logits_match_transformers_at_200_positions(network, tokenizer, documents, stories_bundle):
    tokens = tokenizer.encode(documents.read_text("utf-8"))[:POSITIONS]
    assert len(tokens) == POSITIONS
    with torch.no_grad():
        expected = network(torch.tensor([tokens])).logits[0].numpy()
    with edgelm.load(stories_bundle("fp32"), threads=1) as model:
        inputs = np.array(tokens, np.int64)
        logits = model.worker.call(lambda engine: engine.runner.prefill(0, inputs, 0, all_logits=True))
    assert np.abs(logits - expected).max() < 1e-3


def test_greedy_text_matches_transformers(network, tokenizer, stories_bundle):
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    with torch.no_grad():
        whole = network.generate(ids, max_new_tokens=200, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    expected = whole[ids.shape[1] :].tolist()
    with edgelm.load(stories_bundle("fp32"), threads=1) as model:
        done = model.generate(PROMPT, max_tokens=200, temperature=0.0, ignore_eos=True)
    assert done.usage.prompt_tokens == ids.shape[1]
    assert list(done.tokens) == expected
    assert PROMPT + done.text == tokenizer.decode(whole, skip_special_tokens=True)


def test_perplexity_matches_transformers(reference_quality, documents, stories_bundle):
    perplexity, bits_per_byte, count = reference_quality
    result = evaluated(stories_bundle("fp32"), documents)
    assert result["tokens"] == count
    assert result["perplexity"] == pytest.approx(perplexity, rel=1e-3)
    assert result["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-3)


@pytest.mark.parametrize(("quant", "most"), [("int8", 0.01), ("int4", 0.20)])
def test_the_perplexity_cost_of_quantization(quant, most, reference_quality, documents, stories_bundle):
    perplexity, _, count = reference_quality
    result = evaluated(stories_bundle(quant), documents)
    assert result["tokens"] == count
    assert result["perplexity"] < perplexity * (1 + most)
