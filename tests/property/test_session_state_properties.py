"""A session keeps its tokens exactly; they decode to the text of the chat template; limits of sessions hold."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import byte_fallback, byte_level, bytes_of

from edgelm.engine.fairness import ClientLimits
from edgelm.engine.sessions import Sessions, SessionState
from edgelm.errors import RequestError
from edgelm.text.tokenizer import StreamDecoder, Tokenizer
from edgelm.types import Chunk, Completion, Request, SamplingParams

BARE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THOUGHTS = """{% for m in messages %}{% set parts = m.content.split('!') %}
<{{ m.role }}>{{ parts[-1] if m.role == 'assistant' else m.content }}|
{% endfor %}<assistant>"""
"""Omits what precedes the last exclamation mark of earlier answers, as other templates omit thoughts."""
SPACED = """{% for m in messages %}
{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + ' </s>' }}{% endfor %}"""
"""As in Llama 2: the template adds the space before an answer."""
COUNTED = "{{ messages | length }}" + BARE
"""Changes the first character with every message, so no tokens can be kept."""
EXTENDING, REWRITING = {"bare": BARE, "ChatML": CHATML}, {"thoughts": THOUGHTS, "counted": COUNTED}
SAMPLING = SamplingParams()
WORDS = st.text("ab \né漢!", max_size=12)
TURNS = st.lists(
    st.tuples(st.lists(WORDS, min_size=1, max_size=2), st.lists(st.integers(0, 999), max_size=8)), max_size=4
)


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=["byte level", "byte fallback"])
def plain(request):
    return request.param()


def with_template(tokenizer, template):
    return Tokenizer(tokenizer._inner, template, bos_token="<s>", eos_token="</s>")


def messages_of(texts):
    return tuple({"role": "user", "content": text} for text in texts)


def spelled(tokenizer, tokens, before=()):
    """Return the text of tokens that follow others."""
    decoder = StreamDecoder(tokenizer, before)
    return "".join(map(decoder.push, tokens)) + decoder.finish()


def talk(turns, tokenizer):
    """Yield the state before each turn, the state with the prompt, and the tokens of the answer."""
    now = SessionState()
    for i, (texts, answer) in enumerate(turns):
        asked = now.with_prompt(Request(str(i), SAMPLING, messages=messages_of(texts)), tokenizer)
        said = tuple(token % tokenizer.vocab_size for token in answer)
        yield now, asked, said
        now = asked.with_answer(said, tokenizer)


@pytest.mark.parametrize("template", EXTENDING)
@given(turns=TURNS)
def test_tokens_of_earlier_turns_are_kept(template, turns, plain):
    tokenizer = with_template(plain, EXTENDING[template])
    for before, asked, said in talk(turns, tokenizer):
        assert list(asked.tokens[: len(before.tokens)]) == list(before.tokens)
        after = asked.with_answer(said, tokenizer)
        assert tuple(after.tokens) == (*asked.tokens, *said)
        assert after.turns == before.turns + 1


@pytest.mark.parametrize("template", EXTENDING | REWRITING)
@given(turns=TURNS)
def test_the_tokens_decode_to_the_text_of_the_template(template, turns, plain):
    tokenizer = with_template(plain, (EXTENDING | REWRITING)[template])
    messages = ()
    for i, (before, asked, said) in enumerate(talk(turns, tokenizer)):
        messages = (*messages, *messages_of(turns[i][0]))
        assert asked.text == tokenizer.render_chat(messages)
        kept = next(n for n in range(len(before.tokens), -1, -1) if list(asked.tokens[:n]) == list(before.tokens[:n]))
        fresh = tokenizer.encode(asked.text, add_special_tokens=False)
        if "\ufffd" not in asked.text:  # invalid bytes have several tokenizations
            assert spelled(tokenizer, asked.tokens) == spelled(tokenizer, fresh)
        if template == "counted" or not before.turns:
            assert list(asked.tokens) == fresh
        assert kept >= (len(before.tokens) if template in EXTENDING else 0)
        messages = (*messages, {"role": "assistant", "content": spelled(tokenizer, said, asked.tokens)})


@given(texts=st.lists(WORDS.filter(lambda text: "!" not in text), min_size=2, max_size=2))
def test_tokens_are_kept_up_to_the_first_difference(texts, plain):
    tokenizer = with_template(plain, THOUGHTS)
    first = SessionState().with_prompt(Request("1", SAMPLING, messages=messages_of(texts[:1])), tokenizer)
    thought = tuple(tokenizer.encode_continuation("a!b"))
    asked = first.with_answer(thought, tokenizer).with_prompt(
        Request("2", SAMPLING, messages=messages_of(texts[1:])), tokenizer
    )
    assert list(asked.tokens[: len(first.tokens)]) == list(first.tokens)
    assert list(asked.tokens[len(first.tokens) :]) == tokenizer.encode_continuation(asked.text[len(first.text) :])
    assert asked.text == f"{first.text}b|\n<user>{texts[1]}|\n<assistant>"


@given(texts=st.lists(WORDS, min_size=3, max_size=3))
def test_a_template_may_add_the_space_before_an_answer(texts, plain):
    tokenizer = with_template(plain, SPACED)
    now = SessionState()
    for i, text in enumerate(texts):
        asked = now.with_prompt(Request(str(i), SAMPLING, messages=messages_of([text])), tokenizer)
        assert list(asked.tokens[: len(now.tokens)]) == list(now.tokens)
        now = asked.with_answer(tuple(tokenizer.encode_continuation(" b b")), tokenizer)
        assert now.messages[-1]["content"] == " b b"
    assert now.text.count("[/INST] b b </s>") == len(texts) - 1


@given(texts=st.lists(WORDS, min_size=1, max_size=5), ids=st.booleans())
def test_plain_prompts_are_appended_unchanged(texts, ids, plain):
    now, names = SessionState(), bytes_of(plain)
    for i, text in enumerate(texts):
        given = {"tokens": tuple(plain.encode_continuation(text))} if ids else {"prompt": text}
        asked = now.with_prompt(Request(str(i), SAMPLING, **given), plain)
        new = asked.tokens[len(now.tokens) :]
        if not ids and not i:
            assert list(new) == plain.encode(text)
        else:
            assert b"".join(names[token] for token in new).decode() == text
        now = asked.with_answer((), plain)


@given(before=WORDS, text=WORDS)
def test_a_continuation_adds_no_space(before, text, plain):
    tokens = [*plain.encode(before, add_special_tokens=False), *plain.encode_continuation(text)]
    assert plain.decode(tokens) == (before + text if before else plain.decode(plain.encode_continuation(text)))


def test_prompts_and_messages_do_not_mix(plain):
    tokenizer = with_template(plain, BARE)
    said = Request("1", SAMPLING, messages=messages_of(["a"]))
    typed = Request("1", SAMPLING, prompt="a", raw=True)
    for first, then, names in ((said, typed, "messages"), (typed, said, "plain text")):
        talked = SessionState().with_prompt(first, tokenizer).with_answer((), tokenizer)
        with pytest.raises(RequestError, match=names):
            talked.with_prompt(then, tokenizer)


def test_a_prompt_is_a_user_message(plain):
    tokenizer = with_template(plain, BARE)
    prompts, said = SessionState(), SessionState()
    for turn in ("a", "b"):
        prompts = prompts.with_prompt(Request("1", SAMPLING, prompt=turn), tokenizer)
        said = said.with_prompt(Request("1", SAMPLING, messages=messages_of([turn])), tokenizer)
        assert list(prompts.tokens) == list(said.tokens)
        prompts, said = prompts.with_answer((), tokenizer), said.with_answer((), tokenizer)
    typed = SessionState().with_prompt(Request("1", SAMPLING, prompt="a", raw=True), tokenizer)
    assert list(typed.tokens) == tokenizer.encode("a")
    assert typed.messages is None


def test_a_session_keeps_its_system_message(plain):
    tokenizer = with_template(plain, BARE)
    first = Request("1", SAMPLING, prompt="a", system="Be brief.")
    talked = SessionState().with_prompt(first, tokenizer).with_answer((), tokenizer)
    assert talked.messages[0] == {"role": "system", "content": "Be brief."}
    for system in (None, "Be brief."):
        again = talked.with_prompt(Request("1", SAMPLING, prompt="b", system=system), tokenizer)
        assert [message["role"] for message in again.messages] == ["system", "user", "assistant", "user"]
    with pytest.raises(RequestError, match="system"):
        talked.with_prompt(Request("1", SAMPLING, prompt="b", system="Be long."), tokenizer)
    twice = ({"role": "system", "content": "a"}, *messages_of(["b"]))
    with pytest.raises(RequestError, match="system"):
        SessionState().with_prompt(Request("1", SAMPLING, messages=twice, system="Be brief."), tokenizer)


CONTEXT, MOST = 40, 3
OPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "end", "last"]),
        st.sampled_from("abcd"),
        st.sampled_from([None, "x"]),
        st.lists(st.integers(1, 9), max_size=12),
        st.sampled_from([None, None, None, "internal"]),
    ),
    max_size=25,
)


@given(ops=OPS)
def test_sessions_equal_a_dictionary_in_order_of_last_use(ops, plain):
    known = Sessions(plain, CONTEXT, max_sessions=MOST)
    expected = OrderedDict()
    for number, (what, session, client, tokens, fault) in enumerate(ops):
        name = (client, session)
        if what == "end":
            assert known.end_session(session, client) == (expected.pop(name, None) is not None)
            continue
        given = {"tokens": tuple(tokens)} if what == "ask" or tokens else {}
        request = Request(str(number), SAMPLING, session=session, client=client, end_session=what == "last", **given)
        before = expected.get(name)
        error = None if fault is None else RequestError(fault, "on purpose")
        conversation = known.begin_request(request)
        assert known.is_session_busy(request)
        if not request.is_end_session_only:
            if before and len(before) + len(tokens) >= CONTEXT:
                with pytest.raises(RequestError, match=rf"\b{len(before)}\b.*\b{CONTEXT}\b") as caught:
                    known.append_prompt(conversation, request)
                error = caught.value
            else:
                assert known.record_prompt(request, known.append_prompt(conversation, request)) == [
                    *(before or []),
                    *tokens,
                ]
        done = Completion(request.id, "", (1, 2), "error" if error else "stop", error=error)
        last = Chunk(request.id, 0, "", None, True, done)
        assert known.record_completion(Chunk(request.id, 0, "a", 1)).completion is None
        settled = known.record_completion(last).completion
        assert not known.is_session_busy(request)
        if not request.is_end_session_only and error is None:
            assert settled.turn >= 1
            assert (settled.turn == 1) == (before is None)
            expected[name] = [*(before or []), *tokens, 1, 2]
        else:
            assert settled == done
        if name in expected:
            expected.move_to_end(name)
        if what == "last":
            expected.pop(name, None)
        while len(expected) > MOST:
            held = Counter(owner for owner, _ in expected)
            del expected[next(key for key in expected if held[key[0]] == max(held.values()))]
        for owner in (None, "x"):
            mine = [(key[1], len(value)) for key, value in expected.items() if key[0] == owner]
            assert list(known.token_counts(owner).items()) == mine


def test_a_busy_session_ends_after_its_answer(plain):
    known = Sessions(plain, CONTEXT)
    for turn in itertools.count(1):
        request = Request(str(turn), SAMPLING, tokens=(1, 2), session="a")
        known.record_prompt(request, known.append_prompt(known.begin_request(request), request))
        assert known.token_counts() == {"a": 3 * (turn - 1)}
        if turn == 3:
            assert known.end_session("a")
            assert known.token_counts() == {}
        done = Completion(request.id, "", (3,), "stop")
        assert known.record_completion(Chunk(request.id, 0, "", None, True, done)).completion.turn == turn
        if turn == 3:
            break
    assert known.token_counts() == {}
    assert not known.end_session("a")


LIMITS = ClientLimits(sessions=2, session_bytes=60_000, all_sessions_bytes=150_000)


def use(known, number, client, session, *, messages=None):
    """Ask and answer in a session; return the error if it was refused."""
    given = {"tokens": (1, 2)} if messages is None else {"messages": messages}
    request = Request(str(number), SAMPLING, session=session, client=client, **given)
    before = known.begin_request(request)
    error = None
    try:
        known.record_prompt(request, known.append_prompt(before, request))
    except RequestError as refused:
        error = refused
    done = Completion(request.id, "", (3,), "error" if error else "stop", error=error)
    known.record_completion(Chunk(request.id, 0, "", None, True, done))
    return error


@given(used=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyzw")), max_size=40))
def test_a_client_over_its_limit_loses_its_oldest_session(used, plain):
    known, expected = Sessions(plain, 10_000, max_sessions=6, client_limits=LIMITS), {}
    for number, (client, session) in enumerate(used):
        assert use(known, number, client, session) is None
        mine = expected.setdefault(client, [])
        if session in mine:
            mine.remove(session)
        mine.append(session)
        del mine[: -LIMITS.sessions]
        for each in "abc":
            assert list(known.token_counts(each)) == expected.get(each, [])


def test_clients_with_many_sessions_do_not_evict_those_of_others(plain):
    known = Sessions(plain, CONTEXT, max_sessions=10, client_limits=ClientLimits(sessions=8))
    use(known, 0, "quiet", "mine")
    for number in range(1, 60):
        use(known, number, "loud", f"s{number}")
        use(known, 100 + number, "louder", f"s{number}")
    assert list(known.token_counts("quiet")) == ["mine"]
    assert sum(len(known.token_counts(each)) for each in ("quiet", "loud", "louder")) <= 10


LEFT_OUT = "<{{ messages[-1]['content'] }}>"
"""A template that renders only the last message; the session keeps the others too."""


@given(sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=12))
def test_a_session_is_limited_in_bytes_of_all_messages(sizes, plain):
    known = Sessions(with_template(plain, LEFT_OUT), CONTEXT, client_limits=LIMITS)
    for number, size in enumerate(sizes):
        messages = ({"role": "user", "content": "a" * size}, {"role": "user", "content": "b"})
        error = use(known, number, "a", "s", messages=messages)
        if error is not None and error.code != "bad_request":
            assert error.code == "too_large"
        assert sum(each.size_bytes for each in known._known.values()) <= LIMITS.session_bytes + 1000
        held = sum(len(m["content"]) for each in known._known.values() for m in each.messages or ())
        assert held <= LIMITS.session_bytes


def test_all_sessions_are_limited_in_bytes_and_the_largest_client_loses(plain):
    known = Sessions(with_template(plain, LEFT_OUT), 10_000, client_limits=LIMITS)
    use(known, 0, "quiet", "mine", messages=({"role": "user", "content": "b"},))
    for number in range(1, 12):
        messages = ({"role": "user", "content": "a" * 50_000}, {"role": "user", "content": "b"})
        assert use(known, number, f"loud {number % 4}", f"s{number}", messages=messages) is None
        assert sum(each.size_bytes for each in known._known.values()) <= LIMITS.all_sessions_bytes
    assert list(known.token_counts("quiet")) == ["mine"]
