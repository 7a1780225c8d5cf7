"""A session gives the same tokens as its whole list of tokens does without a session."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm.bundle.bundle_folder import open_bundle
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import EngineOptions
from edgelm.engine.sessions import MAX_SESSIONS
from edgelm.errors import RequestError
from edgelm.types import Request, SamplingParams

NAMES = "abc"


@pytest.fixture(scope="module")
def opened(float32_bundle):
    return open_bundle(float32_bundle)


@pytest.fixture(scope="module", params=[0, 1, 64], ids=["no prefix cache", "small prefix cache", "prefix cache"])
def twins(opened, request):
    """Two equal engines, without speculation, which would depend on their speed."""
    options = {"threads": 1, "max_batch": 2, "prefix_cache_mb": request.param, "speculation": False}
    return Engine(opened, EngineOptions(**options)), Engine(opened, EngineOptions(**options))


@dataclass
class Planned:
    """A request of one round in session `name`, cancelled before step `cancel` of the round."""

    name: str
    tokens: list[int]
    max_tokens: int
    seed: int | None
    fate: str
    cancel: int | None
    last: bool


rounds = st.lists(
    st.lists(
        st.builds(
            Planned,
            name=st.sampled_from(NAMES),
            tokens=st.lists(st.integers(2, 290), min_size=1, max_size=30),
            max_tokens=st.integers(1, 6),
            seed=st.sampled_from([None, None, 1]),
            fate=st.sampled_from(["whole", "whole", "whole", "whole", "no token", "late"]),
            cancel=st.sampled_from([None, None, None, 0, 1, 3]),
            last=st.sampled_from([False, False, False, False, True]),
        ),
        max_size=3,
        unique_by=lambda planned: planned.name,
    ),
    min_size=1,
    max_size=5,
)


def run(engine, requests, cancels=None):
    """Answer requests together; return completions by id. `cancels`: id -> step before which to cancel it."""
    for request in requests:
        engine.add(request, time.monotonic())
    done, step = {}, 0
    while engine.queued or engine.active:
        for name, at in (cancels or {}).items():
            if at == step and name not in done:
                engine.cancel(name)
        done |= {chunk.id: chunk.completion for chunk in engine.step() if chunk.done}
        step += 1
        assert step < 1000
    return done


def alike(completion):
    """Return what must not depend on whether a session was used."""
    error = completion.error and completion.error.code
    return completion.tokens, completion.text, completion.finish_reason, completion.usage, error


@settings(max_examples=30)
@given(rounds=rounds)
def test_a_session_answers_as_its_whole_list_of_tokens(rounds, twins, opened):
    named, plain = twins
    for name in NAMES:
        named.end_session(name)
    said, turns = {}, {}
    for plans in rounds:
        in_sessions, whole = [], []
        for planned in plans:
            wrong = (opened.manifest.vocab_size,) if planned.fate == "no token" else ()
            new = (*planned.tokens, *wrong)
            sampling = SamplingParams(max_tokens=planned.max_tokens, seed=planned.seed, ignore_eos=True)
            common = {"sampling": sampling, "deadline": time.monotonic() if planned.fate == "late" else None}
            in_sessions.append(
                Request(planned.name, tokens=new, session=planned.name, end_session=planned.last, **common)
            )
            whole.append(Request(planned.name, tokens=(*said.get(planned.name, ()), *new), **common))
        cancels = {planned.name: planned.cancel for planned in plans if planned.cancel is not None}
        answers, expected = run(named, in_sessions, cancels), run(plain, whole, cancels)
        for planned, request in zip(plans, whole, strict=True):
            name, answer = planned.name, expected[planned.name]
            assert alike(answers[name]) == alike(answer)
            begun = answer.usage.prompt_tokens > 0
            if begun:
                said[name] = (*request.tokens, *answer.tokens)
                turns[name] = turns.get(name, 0) + 1
            assert answers[name].turn == (turns[name] if begun else None)
            if planned.last and (begun or answer.error is not None):
                said.pop(name, None)
                turns.pop(name, None)
        assert named.session_token_counts() == {name: len(tokens) for name, tokens in said.items()}


@settings(max_examples=10)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from(NAMES), st.lists(st.integers(2, 290), min_size=1, max_size=9)), min_size=2, max_size=8
    )
)
def test_requests_of_one_session_are_answered_one_after_another(asked, twins):
    together, in_turn = twins
    sampling = SamplingParams(max_tokens=3, ignore_eos=True, seed=1)
    for engine in twins:
        for name in NAMES:
            engine.end_session(name)
    requests = [Request(str(i), sampling, tokens=tuple(tokens), session=name) for i, (name, tokens) in enumerate(asked)]
    at_once = run(together, requests)
    for request in requests:
        alone = run(in_turn, [request])[request.id]
        assert at_once[request.id].turn == alone.turn
        assert at_once[request.id].usage == alone.usage
    assert together.session_token_counts() == {name: in_turn.session_token_counts()[name] for name, _ in asked}


def test_a_request_that_fails_the_step_ends_and_releases_its_session(twins, monkeypatch):
    engine = twins[0]
    engine.end_session("a")
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    assert run(engine, [Request("1", sampling, tokens=(5,), session="a")])["1"].turn == 1
    with monkeypatch.context() as patched:
        patched.setattr(engine._admission, "create_sequence", lambda *_: 1 // 0)
        engine.add(Request("2", sampling, tokens=(5,), session="a"), time.monotonic())
        with pytest.raises(ZeroDivisionError):
            engine.step()
    (final,) = engine.fail_all(RequestError("internal", "the step failed"))
    assert (final.id, final.completion.finish_reason, final.completion.turn) == ("2", "error", None)
    assert run(engine, [Request("3", sampling, tokens=(5,), session="a")])["3"].turn == 2


@pytest.fixture(scope="module")
def lm(float32_bundle):
    with edgelm.load(float32_bundle, threads=1, max_batch=2) as loaded:
        yield loaded


@pytest.fixture
def talk(lm):
    """Ask in the new session "one": greedy, at most 5 tokens, raw prompts."""
    lm.end_session("one")

    def ask(prompt=None, **options):
        raw = prompt is not None
        return lm.generate(prompt, **{"session": "one", "max_tokens": 5, "temperature": 0.0, "raw": raw, **options})

    return ask


def test_only_new_tokens_are_computed(lm, talk):
    encoder = lm.tokenizer
    first = talk("The cat sat", ignore_eos=True)
    tokens = [*encoder.encode("The cat sat"), *first.tokens]
    assert (first.turn, lm.sessions()["one"]) == (1, len(tokens))
    second = talk(" on the mat", ignore_eos=True)
    whole = [*tokens, *encoder.encode_continuation(" on the mat")]
    assert second.turn == 2
    assert second.usage.prompt_tokens == len(whole)
    assert second.usage.cached_tokens == len(tokens) - 1  # the last token was never computed
    assert second.tokens == lm.generate(tokens=whole, max_tokens=5, temperature=0.0, ignore_eos=True).tokens


def test_messages_keep_the_tokens_of_answers(lm, talk):
    if lm.manifest.chat_template is None:
        pytest.skip("this bundle has no chat template")
    system, hello = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}
    first = talk(messages=[system, hello], ignore_eos=True, stop=["never said"])
    again = {"role": "user", "content": "again"}
    second = talk(messages=[again], ignore_eos=True)
    encoder = lm.tokenizer
    asked = encoder.encode(encoder.render_chat([system, hello]), add_special_tokens=False)
    closing = encoder.render_chat([system, hello, {"role": "assistant", "content": "@"}, again]).split("@")[1]
    assert second.usage.prompt_tokens == len([*asked, *first.tokens, *encoder.encode_continuation(closing)])
    assert second.usage.cached_tokens >= len(asked) + len(first.tokens) - 1
    assert (first.turn, second.turn) == (1, 2)


def test_text_after_a_stop_string_belongs_to_the_session(lm, talk):
    free = talk("The cat sat", ignore_eos=True, max_tokens=12)
    lm.end_session("one")
    cut = talk("The cat sat", ignore_eos=True, max_tokens=12, stop=[free.text[2]])
    assert cut.text == free.text.split(free.text[2])[0]
    assert cut.finish_reason == "stop"
    assert lm.sessions()["one"] == cut.usage.prompt_tokens + len(cut.tokens)
    assert talk("").usage.prompt_tokens == cut.usage.prompt_tokens + len(cut.tokens)


def test_a_failed_request_does_not_change_the_session(lm, talk):
    talk("The cat sat")
    before = lm.sessions()
    for wrong in ({"tokens": [10**9]}, {"prompt": "a", "regex": "("}, {"prompt": "a " * lm.context}):
        with pytest.raises(RequestError):
            talk(**wrong)
        assert lm.sessions() == before
    assert talk(" on").turn == 2


def test_a_full_session_refuses_with_its_lengths_and_stays(lm, talk):
    context = lm.context
    talk(tokens=[5] * (context - 6), ignore_eos=True)
    assert lm.sessions()["one"] == context - 1
    with pytest.raises(RequestError, match=rf"{context - 1} .*{context} .*{context} "):
        talk(tokens=[5])
    assert lm.sessions()["one"] == context - 1
    assert lm.end_session("one")
    assert not lm.end_session("one")
    assert talk("The cat").turn == 1


def test_a_request_can_end_its_session_with_or_without_a_prompt(lm, talk):
    assert talk("The cat").turn == 1
    assert talk(" sat", end_session=True).turn == 2
    assert "one" not in lm.sessions()
    talk("The cat")
    ended = talk(end_session=True)
    assert (ended.text, ended.finish_reason, ended.turn) == ("", "stop", None)
    assert "one" not in lm.sessions()
    for wrong in ({"session": None, "end_session": True}, {"session": ""}, {"session": "x" * 129}, {"session": "a\n"}):
        with pytest.raises(RequestError, match="session"):
            talk("a", **wrong)


def test_a_cancelled_answer_is_kept_as_far_as_it_came(lm, talk):
    stream = lm.stream("The cat sat", session="one", raw=True, max_tokens=200, temperature=0.0, ignore_eos=True)
    next(stream)
    stream.close()
    following = talk(" on the mat")
    assert following.turn == 2
    encoder = lm.tokenizer
    asked, new = len(encoder.encode("The cat sat")), len(encoder.encode_continuation(" on the mat"))
    assert asked + 1 <= following.usage.prompt_tokens - new < asked + 200


def test_the_least_recently_used_session_is_removed(lm, talk):
    talk("The cat")
    for i in range(MAX_SESSIONS):
        lm.generate("a", session=f"other {i}", max_tokens=1)
        if i < MAX_SESSIONS - 1:
            talk("", max_tokens=1)  # makes it the most recently used one
    assert set(lm.sessions()) == {"one", *(f"other {i}" for i in range(1, MAX_SESSIONS))}
    lm.generate("a", session="one more", max_tokens=1)
    assert "other 1" not in lm.sessions()
    assert lm.generate("a", session="other 1", max_tokens=1).turn == 1
