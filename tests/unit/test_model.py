"""`edgelm.load()` and `Model`."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm import RequestError

PROMPT = "Once upon a time"
LENGTH = 24
GREEDY = {"max_tokens": LENGTH, "temperature": 0.0, "seed": 0}
"""With a seed, neither prefix cache nor draft tokens are used, with which a quantized model rounds differently."""


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="module")
def answer(model):
    """A greedy answer to PROMPT, computed token by token, as every `GREEDY` one is."""
    return model.generate(PROMPT, raw=True, **GREEDY, ignore_eos=True)


def test_a_completion_has_usage_and_timing(model, answer):
    assert len(answer.tokens) == LENGTH
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == LENGTH
    assert answer.usage.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert answer.logprobs is None
    assert answer.error is None
    assert answer.timing.tok_s > 0


def test_prompt_tokens_and_messages_give_the_same_answer(model, answer):
    tokens = model.tokenizer.encode(PROMPT)
    assert model.generate(tokens=tokens, **GREEDY, ignore_eos=True).tokens == answer.tokens
    for options in ({}, {"prompt": "a", "tokens": [1]}):
        with pytest.raises(RequestError, match="exactly one"):
            model.generate(**options)
    with pytest.raises(
        RequestError, match="at least one message" if model.manifest.chat_template else "no chat template"
    ):
        model.generate(messages=[])


def test_a_prompt_is_a_message_if_there_is_a_chat_template(model, answer):
    bare = model.generate(PROMPT, **GREEDY, ignore_eos=True)
    assert model.manifest.prompts_are_messages == (model.manifest.chat_template is not None)
    if not model.manifest.prompts_are_messages:
        assert bare.tokens == answer.tokens
        return
    message = {"role": "user", "content": PROMPT}
    assert bare.usage.prompt_tokens != answer.usage.prompt_tokens
    assert model.generate(messages=[message], **GREEDY, ignore_eos=True).tokens == bare.tokens
    system = {"role": "system", "content": "Be brief."}
    opened = model.generate(messages=[system, message], **GREEDY, ignore_eos=True)
    assert model.generate(PROMPT, system="Be brief.", **GREEDY, ignore_eos=True).tokens == opened.tokens


def test_choose_with_a_chat_template(model):
    if not model.manifest.prompts_are_messages:
        pytest.skip("this bundle completes text")
    tokenizer = model.tokenizer
    asked = tokenizer.encode_prompt(tokenizer.build_prompt([{"role": "user", "content": PROMPT}]))
    ends = [tokenizer.encode(choice, add_special_tokens=False) for choice in ("yes", "no")]
    sums = [model.score_tokens([*asked, *end])[len(asked) - 1 :].sum() for end in ends]
    best, probability = model.choose(PROMPT, [" yes", "no"])
    assert best == [" yes", "no"][int(np.argmax(sums))]
    assert probability == pytest.approx(1 / (1 + np.exp(min(sums) - max(sums))))


@settings(max_examples=40)
@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    temperature=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 1000),
    stop=st.lists(st.text(min_size=1, max_size=3).filter(lambda s: s.isprintable()), max_size=2),
    max_tokens=st.integers(1, 40),
)
def test_streamed_text_equals_the_answer(prompt, temperature, seed, stop, max_tokens, model):
    options = {"temperature": temperature, "seed": seed, "stop": stop, "max_tokens": max_tokens}
    chunks = list(model.stream(prompt, **options))
    done = chunks[-1].completion
    assert "".join(chunk.delta for chunk in chunks) == done.text
    assert [chunk.seq for chunk in chunks] == list(range(len(chunks)))
    assert tuple(chunk.token for chunk in chunks if chunk.token is not None) == done.tokens
    assert not any(text in done.text for text in stop)
    again = model.generate(prompt, **options)
    assert (again.text, again.tokens, again.finish_reason) == (done.text, done.tokens, done.finish_reason)


def test_a_stop_string_ends_the_answer_before_it(model, answer):
    middle = answer.text[len(answer.text) // 2 :][:3]
    assert middle
    for stop in (middle, [middle], ("unheard of", middle)):
        done = model.generate(PROMPT, raw=True, **GREEDY, ignore_eos=True, stop=stop)
        assert done.finish_reason == "stop"
        assert done.text == answer.text[: answer.text.index(middle)]
        assert done.tokens == answer.tokens[: len(done.tokens)]
        assert len(done.tokens) < LENGTH or answer.text.endswith(middle)


def test_an_end_token_ends_the_answer_and_is_not_in_it(model, answer):
    """The fifth token of the greedy answer is declared an end token."""
    fifth = answer.tokens[4]
    first_at = answer.tokens.index(fifth)

    def declare(engine):
        before, engine._admission._eos = engine._admission._eos, frozenset([fifth])
        return before

    before = model.worker.call(declare)
    try:
        done = model.generate(PROMPT, raw=True, **GREEDY)
        kept = model.generate(PROMPT, raw=True, **GREEDY, ignore_eos=True)
    finally:
        model.worker.call(lambda engine: setattr(engine._admission, "_eos", before))
    assert done.finish_reason == "stop"
    assert done.tokens == answer.tokens[:first_at]
    assert kept.tokens == answer.tokens


def test_a_full_context_ends_with_length(model):
    context = model.context
    done = model.generate(tokens=[5] * (context - 7), max_tokens=100, ignore_eos=True)
    assert (done.finish_reason, len(done.tokens)) == ("length", 7)


def test_a_shorter_context_is_enforced(bundle):
    with edgelm.load(bundle, threads=1, context=16) as model:
        with pytest.raises(RequestError, match=r"17.*16"):
            model.generate(tokens=[5] * 17)
        assert len(model.generate(tokens=[5] * 10, ignore_eos=True).tokens) == 6
        with pytest.raises(RequestError, match=r"17.*16"):
            model.score_tokens([5] * 17)
        assert len(model.score_tokens([5] * 16)) == 15


@pytest.mark.parametrize("length", [2, 63, 64, 65, 66, 129, 200])
def test_scores_equal_the_logprobs_of_sampling(length, model):
    generator = np.random.default_rng(length)
    prompt = generator.integers(2, min(300, model.manifest.vocab_size), length).tolist()
    done = model.generate(tokens=prompt, max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)
    assert [entry.token for entry in done.logprobs] == list(done.tokens)
    for entry in done.logprobs:
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token, entry.logprob)
        assert entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1]
    scores = model.score_tokens([*prompt, *done.tokens])
    assert len(scores) == length + 11
    assert (scores <= 0).all()
    # Quantized activations can differ by one step if a batch of another size rounds differently.
    tolerance = 1e-4 if model.manifest.quant == "fp32" else 0.1
    assert np.allclose(scores[-12:], [entry.logprob for entry in done.logprobs], atol=tolerance)


def test_a_text_is_scored_after_the_start_token(model):
    tokenizer = model.tokenizer
    bos = model.manifest.bos_token
    ids = ([] if bos is None else [bos]) + tokenizer.encode(PROMPT, add_special_tokens=False)
    assert np.array_equal(model.score(PROMPT), model.score_tokens(ids))
    assert len(model.score_tokens([5])) == len(model.score_tokens([])) == 0
    with pytest.raises(RequestError, match="vocabulary"):
        model.score_tokens([5, model.manifest.vocab_size])


def test_choose_agrees_with_score(model):
    choices = [" yes", " no", " maybe so"]
    encode = model.tokenizer.encode
    asked = encode(PROMPT)
    whole = [encode(PROMPT + choice) for choice in choices]
    if any(tokens[: len(asked)] != asked for tokens in whole):
        pytest.skip("this bundle's tokens do not end where the prompt does")
    sums = np.array([model.score_tokens(tokens)[len(asked) - 1 :].sum() for tokens in whole])
    shares = np.exp(sums) / np.exp(sums).sum()
    best, probability = model.choose(PROMPT, choices, raw=True)
    assert best == choices[int(shares.argmax())]
    assert probability == pytest.approx(shares.max())
    assert model.choose(PROMPT, ["only"]) == ("only", 1.0)
    for bad in ([], [""]):
        with pytest.raises(RequestError):
            model.choose(PROMPT, bad)


def test_choose_refuses_a_prompt_without_tokens(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "encode", lambda _text, **_: [])  # no text, no start token
    with pytest.raises(RequestError, match="prompt is empty"):
        model.choose("", ["yes", "no"])


def test_a_seed_repeats_an_answer(model):
    def sample(**options):
        return model.generate(PROMPT, max_tokens=30, temperature=1.5, ignore_eos=True, **options).tokens

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    assert sample() != sample()


@pytest.mark.parametrize("close", [True, False], ids=["closed", "garbage-collected"])
def test_leaving_a_stream_early_ends_its_request(close, model, monkeypatch):
    steps, left = [], threading.Event()
    real = model.worker._engine.step

    def step():
        steps.append(1)
        assert len(steps) < 3 or left.wait(60)  # the third step waits until the stream is closed
        return real()

    monkeypatch.setattr(model.worker._engine, "step", step)
    completed = model.worker.stats().completed
    stream = model.stream(PROMPT, max_tokens=100, ignore_eos=True)
    next(stream)
    if close:
        stream.close()
    del stream
    gc.collect()
    left.set()
    wait_until(lambda: model.worker.stats().completed > completed)
    assert len(steps) <= 4
    assert model.worker.stats().active == 0


def test_a_stream_that_is_not_read_submits_nothing(model):
    completed = model.worker.stats().completed
    model.stream(PROMPT).close()
    model.generate(PROMPT, max_tokens=1)
    assert model.worker.stats().completed == completed + 1


def test_an_invalid_argument_raises_at_the_call(model):
    for options in ({"temperature": -1}, {"temprature": 1}, {"max_tokens": 0}, {"choices": []}, {"stop": [""]}):
        with pytest.raises(RequestError, match=next(iter(options))):
            model.stream(PROMPT, **options)
    with pytest.raises(RequestError, match="temperature"):
        model.generate(PROMPT, temprature=1)
    with pytest.raises(RequestError, match="at most one"):
        model.generate(PROMPT, regex="a", choices=["b"])


def test_a_timeout_ends_with_the_answer_so_far(model):
    done = model.generate(PROMPT, timeout_s=0.0, max_tokens=400, ignore_eos=True)
    assert (done.finish_reason, done.tokens) == ("deadline", ())


def test_threads_get_their_own_answers(model, float32_bundle):
    prompts = [f"{PROMPT} number {i}" for i in range(12)]
    expected = [
        model.generate(prompt, max_tokens=20, temperature=0.9, seed=i).tokens for i, prompt in enumerate(prompts)
    ]
    got = [None] * len(prompts)

    def ask(i):
        got[i] = model.generate(prompts[i], max_tokens=20, temperature=0.9, seed=i).tokens

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert got == expected


def test_a_closed_model_raises(bundle):
    model = edgelm.load(bundle, threads=1)
    stream = model.stream(PROMPT, max_tokens=400, ignore_eos=True)
    next(stream)
    model.close()
    with pytest.raises(RequestError) as caught:
        list(stream)
    assert caught.value.code == "interrupted"
    with pytest.raises(edgelm.EdgelmError):
        model.generate(PROMPT)
    with pytest.raises(edgelm.EdgelmError):
        model.score(PROMPT)


def test_answers_match_their_constraints(model):
    assert model.generate(PROMPT, choices=["yes", "no"], max_tokens=20).text in ("yes", "no")
    assert model.generate(PROMPT, regex="[0-9]{3}", max_tokens=20).text.isdigit()
    done = model.generate(PROMPT, regex=r'\{"on": (true|false)\}', max_tokens=100)
    assert done.finish_reason == "stop"
    assert isinstance(done.json["on"], bool)


def test_bundles_that_cannot_be_loaded(bundle, tmp_path):
    with pytest.raises(edgelm.BundleError, match="nowhere"):
        edgelm.load(tmp_path / "nowhere")
    for options in ({"context": 0}, {"threads": 0}, {"max_batch": 0}):
        with pytest.raises(edgelm.EdgelmError, match=next(iter(options))):
            edgelm.load(bundle, **options)


NOT_CLOSED = """
import sys, threading, edgelm
lm = edgelm.load(sys.argv[1], threads=2)
if sys.argv[2] == "asking":
    threading.Thread(target=lambda: list(lm.stream("Once", max_tokens=100, ignore_eos=True)), daemon=True).start()
"""


@pytest.mark.parametrize("what", ["nothing", "asking"])
def test_a_program_can_end_without_closing_its_model(bundle, what):
    for _ in range(3):
        command = [sys.executable, "-c", NOT_CLOSED, str(bundle), what]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "terminate" not in done.stderr
