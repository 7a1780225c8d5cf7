"""Exports via optimum: our quantizer and runtime against transformers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from foreign_models import CONTEXT, SHAPES, VOCAB, model_of, onnx, torch, write

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.errors import EdgelmError, RequestError

pytestmark = pytest.mark.usefixtures("one_torch_thread")

NEW = 20
PROMPTS = [np.random.default_rng(i).integers(2, 300, length).tolist() for i, length in enumerate((40, 7, 1, 23))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Kind -> its checkpoint."""
    return cache(lambda kind: write(model_of(kind), tmp_path_factory.mktemp("checkpoint") / kind))


@pytest.fixture(scope="module")
def bundle_of(checkpoint, export_to_cache):
    """Kind, precision -> its bundle."""
    return lambda kind, quant: export_to_cache(checkpoint(kind), quant=quant, via="optimum")


@pytest.fixture(scope="module")
def gpt2(bundle_of):
    with edgelm.load(bundle_of("gpt2", "fp32"), threads=1, max_batch=4) as model:
        yield model


def true_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def greedy(model, prompt, count) -> list[int]:
    """Transformers' greedy tokens, each computed from the whole text."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(true_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def our_logits(bundle: Path, prompt, following) -> np.ndarray:
    """Logits at every place: the prompt in two chunks, then one decoding step a token. float32 [n, V]."""
    with edgelm.load(bundle, threads=1) as model:

        def compute(engine):
            ids, cut = np.array(prompt, np.int64), len(prompt) // 3
            parts = [engine.runner.prefill(0, ids[:cut], 0, all_logits=True).copy()] if cut else []
            parts.append(engine.runner.prefill(0, ids[cut:], cut, all_logits=True).copy())
            for place, token in enumerate(following, len(prompt)):
                step = engine.runner.decode(np.array([token], np.int64), np.array([place], np.int32))
                parts.append(step.copy())
            return np.concatenate(parts)

        return model.worker.call(compute)


@pytest.mark.parametrize("kind", SHAPES)
def test_float32_logits_equal_those_of_transformers(kind, bundle_of):
    prompt = PROMPTS[0]
    following = greedy(model_of(kind), prompt, NEW)
    want = true_logits(model_of(kind), prompt + following)
    np.testing.assert_allclose(our_logits(bundle_of(kind, "fp32"), prompt, following), want, rtol=0, atol=1e-3)
    assert len(set(want.argmax(axis=1).tolist())) > 10  # a model that repeats itself is a weak test


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_tokens_equal_those_of_transformers(prompt, gpt2):
    done = gpt2.generate(tokens=prompt, max_tokens=NEW, temperature=0.0, ignore_eos=True)
    assert list(done.tokens) == greedy(model_of("gpt2"), prompt, NEW)


def test_a_longer_prompt_reuses_a_shorter_one(gpt2):
    prompt = PROMPTS[0]
    gpt2.generate(tokens=prompt[:9], max_tokens=1)
    done = gpt2.generate(tokens=prompt, max_tokens=NEW, temperature=0.0, ignore_eos=True)
    assert list(done.tokens) == greedy(model_of("gpt2"), prompt, NEW)
    assert done.usage.cached_tokens >= 9


def test_scores_equal_those_of_transformers(gpt2):
    tokens = PROMPTS[0] + PROMPTS[3] + PROMPTS[1]  # more than one pass of the engine
    logits = torch.tensor(true_logits(model_of("gpt2"), tokens)).double()
    want = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    np.testing.assert_allclose(gpt2.score_tokens(tokens), want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", SHAPES)
def test_int8_logits_are_close(kind, bundle_of):
    want = true_logits(model_of(kind), PROMPTS[0])
    error = our_logits(bundle_of(kind, "int8"), PROMPTS[0], []) - want
    assert 0 < np.sqrt(np.mean(error**2)) < 0.05 * want.std()


def test_int4_answers_and_differs_more(bundle_of):
    want = true_logits(model_of("gpt2"), PROMPTS[0])
    errors = [np.abs(our_logits(bundle_of("gpt2", quant), PROMPTS[0], []) - want).mean() for quant in ("int8", "int4")]
    assert 3 * errors[0] < errors[1] < want.std()
    with edgelm.load(bundle_of("gpt2", "int4"), threads=1) as model:
        done = model.generate("Turn off the light", max_tokens=8, temperature=0.0, ignore_eos=True)
    assert len(done.tokens) == 8
    assert done.finish_reason == "length"


def test_the_manifest_of_an_export_via_optimum(checkpoint, bundle_of):
    opened = open_bundle(bundle_of("gpt2", "int4"))
    manifest = opened.manifest
    assert (manifest.via, manifest.cache.kind, manifest.architecture) == ("optimum", "growing", "gpt2")
    assert (manifest.context, manifest.vocab_size, manifest.quant) == (CONTEXT, VOCAB, "int4")
    assert (manifest.cache.layers, manifest.cache.kv_heads, manifest.cache.head_size) == (2, 3, 24)
    assert manifest.parameters == model_of("gpt2").num_parameters()
    assert manifest.made_with["optimum-onnx"] == version("optimum-onnx")
    assert (manifest.bos_token, manifest.eos_tokens) == (0, (1,))
    assert sorted(path.name for path in opened.path.iterdir()) == [
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    ]
    matrices = {matrix.name: (matrix.rows, matrix.columns) for matrix in manifest.matrices}
    layer = {"attn.c_attn": (216, 72), "attn.c_proj": (72, 72), "mlp.c_fc": (288, 72), "mlp.c_proj": (72, 288)}
    expected = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    assert matrices == {"transformer.wte": (VOCAB, 72), **expected}  # the tied head is the table
    assert all((matrix.bits, matrix.block_size) == (4, 32) for matrix in manifest.matrices)


@pytest.mark.parametrize("quant", ["fp32", "int8"])
def test_each_weight_is_stored_once(quant, bundle_of):
    opened = open_bundle(bundle_of("gpt2", quant))
    graph = onnx.load(opened.graph, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    places = {}
    for tensor in tensors.values():
        where = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
        places.setdefault(where.get("offset", -1), set()).add(where.get("length"))
    assert all(len(lengths) == 1 for offset, lengths in places.items() if offset >= 0)
    on_disk = sum(lengths.pop() for offset, lengths in places.items() if offset >= 0)
    position_table = CONTEXT * 72 * 4
    assert on_disk <= sum(matrix.bytes() for matrix in opened.manifest.matrices) + position_table
    operators = [node.op_type for node in graph.node]
    weights = {name for name, tensor in tensors.items() if len(tensor.dims) == 2 and tensor.data_type == 1}
    if quant == "fp32":
        assert not {"MatMulNBits", "GatherBlockQuantized"} & set(operators)
    else:
        assert operators.count("MatMulNBits") == 9
        assert "Gemm" not in operators
        left = {name for name in weights if not name.endswith(".scales")}
        assert left == {"transformer.wpe.weight"}
        assert sum(len(node.input) == 6 for node in graph.node if node.op_type == "MatMulNBits") == 8  # with a bias


def test_answers_do_not_depend_on_the_batch(gpt2):
    """Six threads with prompts of four lengths, on four rows, get the same answers as each prompt alone."""
    jobs = [(prompt, count) for prompt in PROMPTS for count in (3, NEW, 11)]
    options = {"temperature": 0.8, "seed": 5, "ignore_eos": True}
    alone = [gpt2.generate(tokens=prompt, max_tokens=count, **options).tokens for prompt, count in jobs]
    together: dict[int, tuple[int, ...]] = {}

    def work(first: int) -> None:
        for i in range(first, len(jobs), 6):
            together[i] = gpt2.generate(tokens=jobs[i][0], max_tokens=jobs[i][1], **options).tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(jobs))] == alone


def test_an_answer_ends_where_the_context_does(gpt2):
    done = gpt2.generate(tokens=PROMPTS[0], max_tokens=1000, temperature=0.0, ignore_eos=True)
    assert done.finish_reason == "length"
    assert len(PROMPTS[0]) + len(done.tokens) == CONTEXT
    with pytest.raises(RequestError, match=f"{CONTEXT}"):
        gpt2.generate(tokens=[5] * (CONTEXT + 1))


def test_the_command_is_quiet_and_repeatable(checkpoint, bundle_of, tmp_path):
    command = [sys.executable, "-m", "edgelm", "export", str(checkpoint("gpt2")), str(tmp_path / "out")]
    done = subprocess.run([*command, "--via", "optimum", "--quant", "int8", "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    want = open_bundle(bundle_of("gpt2", "int8")).manifest.digest  # which covers every file
    assert json.loads(done.stdout)["digest"] == want


def test_the_context_stays_within_a_sliding_window(bundle_of):
    """A cache that drops its oldest positions would be shorter than the runtime expects."""
    assert open_bundle(bundle_of("mistral", "fp32")).manifest.context == SHAPES["mistral"]["sliding_window"] - 1


def test_the_quality_gate_compares_with_optimums_float32_graph(checkpoint, tmp_path):
    import edgelm_export

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl. " * 12, encoding="utf-8")
    quality = {}
    for quant in ("fp32", "int8", "int4"):
        bundle = edgelm_export.export(checkpoint("gpt2"), tmp_path / quant, quant=quant, via="optimum", verify=text)
        quality[quant] = bundle.manifest.quality
        assert set(bundle.manifest.files) == {"model.onnx", "model.onnx.data", "tokenizer.json"}
    assert quality["fp32"]["kl_mean"] < 1e-9 < quality["int8"]["kl_mean"] < quality["int4"]["kl_mean"]
    measured = edgelm_export.compare(tmp_path / "int8", checkpoint("gpt2"), text)
    assert measured == pytest.approx(quality["int8"])
    with pytest.raises(EdgelmError, match="--max-kl"):
        edgelm_export.export(
            checkpoint("gpt2"), tmp_path / "none", quant="int4", via="optimum", verify=text, max_kl=1e-6
        )
    assert not (tmp_path / "none").exists()


def test_a_static_prefix(checkpoint, gpt2, tmp_path):
    import edgelm_export

    opening = tmp_path / "opening.txt"
    opening.write_text("Once upon a time there was a little girl", encoding="utf-8")
    made = edgelm_export.export(checkpoint("gpt2"), tmp_path / "out", quant="fp32", via="optimum", prefix=opening)
    prefix = list(made.manifest.prefix.tokens)
    for following in PROMPTS:
        prompt = [*prefix, *following]
        expected = gpt2.generate(tokens=prompt, max_tokens=8, ignore_eos=True, seed=0)
        for mb in (0, 64):
            with edgelm.load(tmp_path / "out", threads=1, max_batch=1, prefix_cache_mb=mb) as model:
                done = model.generate(tokens=prompt, max_tokens=8, ignore_eos=True)
            assert (done.tokens, done.usage.cached_tokens) == (expected.tokens, len(prefix))


def test_a_step_is_profiled_by_operator_alone(bundle_of, run):
    sizes = ["--prompt-tokens", 5, "--new-tokens", 2, "--repeat", 1, "--threads", 1, "--batch", 2]
    code, out, err = run("bench", bundle_of("gpt2", "int8"), *sizes, "--profile", "--no-cache")
    assert (code, err) == (0, "")
    assert "by layer " not in out
    assert "MatMulNBits" in out
    code, out, err = run("bench", bundle_of("gpt2", "int8"), *sizes, "--profile", "--no-cache", "--json")
    assert (code, err) == (0, "")
    prefill, decode = json.loads(out)["phases"]
    assert (prefill["layers"], decode["layers"]) == (None, None)
    once, twice = (sum(row["nodes"] for row in phase["operators"]) for phase in (prefill, decode))
    assert twice == 2 * once  # rows are decoded one after the other
