"""Training data: tasks and their scores, packing, tokenizer, shapes, utterances and their augmentation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from edgelm_export.distill.augment import AugmentationRates, Augmenter
from edgelm_export.distill.data import (
    IGNORED_LABEL,
    PADDING_SEGMENT,
    EncodedExample,
    collate,
    encode_tasks,
    make_batches,
    pack_rows,
)
from edgelm_export.distill.shape import StudentShape, parse_shape
from edgelm_export.distill.snips import Utterance, answer_pieces, read_utterances
from edgelm_export.distill.student_tokenizer import ANSWER, BOS, EOS, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import ConfigError, DataError
from edgelm.evaluation.tasks import Task, read_tasks, score_tasks

SENTENCES = ["play some jazz by Miles Davis", "what is the weather in Paris", "rate this book 5 of 6", 'a "quote"']


@pytest.fixture(scope="module", params=[False, True], ids=["joined", "apart"])
def tokenizer(request):
    return train_tokenizer(
        SENTENCES, 330, ['{"intent": "Play", "slots": {"', 'artist": "', '"}}'], spaces_apart=request.param
    )


examples = st.lists(
    st.tuples(st.lists(st.integers(1, 500), min_size=2, max_size=20), st.integers(1, 19)), min_size=1, max_size=40
).map(lambda rows: [EncodedExample(np.array(tokens, np.int32), min(start, len(tokens) - 1)) for tokens, start in rows])


@given(lengths=st.lists(st.integers(1, 64), max_size=200))
def test_every_example_is_packed_once_into_rows_that_hold_it(lengths):
    rows = pack_rows(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= 64 for row in rows)


def test_later_examples_fill_earlier_rows():
    assert pack_rows([40, 40, 40, 24, 24, 24], 64) == [[0, 3], [1, 4], [2, 5]]


@given(examples=examples)
def test_packed_rows_give_back_every_example(examples):
    rows = [[examples[index] for index in row] for row in pack_rows([len(e.tokens) for e in examples], 32)]
    batch = collate(rows, 32)
    for at, row in enumerate(rows):
        for segment, example in enumerate(row):
            here = batch.segments[at] == segment
            assert np.array_equal(batch.tokens[at, here], example.tokens)
            assert np.array_equal(batch.positions[at, here], np.arange(len(example.tokens)))
            labels = batch.labels[at, here]
            learned = np.flatnonzero(labels != IGNORED_LABEL)
            assert np.array_equal(learned + 1, np.arange(example.target_start, len(example.tokens)))
            assert np.array_equal(labels[learned], example.tokens[example.target_start :])
    empty = batch.segments == PADDING_SEGMENT
    assert (batch.labels[empty] == IGNORED_LABEL).all()
    assert (~empty).sum() == sum(len(e.tokens) for e in examples)


@given(examples=examples, seed=st.integers(0, 9))
def test_a_seed_decides_the_batches_and_none_is_lost(examples, seed):
    first, again = (make_batches(examples, 32, 3, np.random.default_rng(seed)) for _ in range(2))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert sum(int((b.segments != PADDING_SEGMENT).sum()) for b in first) == sum(len(e.tokens) for e in examples)


@given(text=st.text(max_size=60))
def test_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not any(special in text for special in (BOS, EOS, ANSWER)):
        assert tokenizer.decode(ids) == text


@given(text=st.sampled_from(SENTENCES))
def test_the_tokenizer_wraps_a_prompt_and_hides_the_wrapping(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert (ids[0], ids[-1]) == (tokenizer.token_to_id(BOS), tokenizer.token_to_id(ANSWER))
    assert tokenizer.decode(ids) == text


def test_a_piece_is_one_token_that_decodes_to_itself(tokenizer):
    answer = '{"intent": "Play", "slots": {"artist": "Miles"}}'
    encoding = tokenizer.encode(answer, add_special_tokens=False)
    assert encoding.tokens[:2] == ['{"intent": "Play", "slots": {"', 'artist": "']
    assert encoding.tokens[-1] == '"}}'
    assert tokenizer.decode(encoding.ids) == answer


def test_with_spaces_apart_a_word_has_the_same_tokens_everywhere():
    tokenizer = train_tokenizer(SENTENCES, 330, spaces_apart=True)
    word = tokenizer.encode("weather", add_special_tokens=False).ids
    inside = tokenizer.encode("the weather", add_special_tokens=False).ids
    assert inside[-len(word) :] == word


def test_a_task_is_prompt_target_end(tokenizer):
    (encoded,) = encode_tasks(tokenizer, [Task("play", "jazz")], 0, 64)
    assert tokenizer.decode(encoded.tokens[: encoded.target_start].tolist()) == "play"
    assert tokenizer.decode(encoded.tokens[encoded.target_start :].tolist()) == "jazz"
    assert encoded.tokens[-1] == 0


def test_an_example_longer_than_a_row_is_named_by_its_line(tokenizer):
    with pytest.raises(DataError, match=r"line 7 .*tokens.* 8"):
        encode_tasks(tokenizer, [Task("a", "b"), Task("a b c d e f", "g h i", 7)], 0, 8)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: .*JSON"),
        ("[1]", "line 2: .*list"),
        ('{"prompt": "a"}', "line 2: 'target'"),
        ('{"prompt": "", "target": "b"}', "line 2: 'prompt'"),
        ('{"prompt": 1, "target": "b"}', "line 2: 'prompt'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "target": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=complaint):
        read_tasks(path)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff"])
def test_a_file_without_tasks_is_refused(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.jsonl"):
        read_tasks(path)


names = st.sampled_from(["artist", "city", "object_name"])
slots = st.dictionaries(names, st.one_of(st.text(max_size=5), st.lists(st.text(max_size=5), min_size=2, max_size=3)))
frames = st.builds(lambda intent, slots: {"intent": intent, "slots": slots}, st.sampled_from(["A", "B"]), slots)


@given(frames=st.lists(frames, min_size=1, max_size=10))
def test_right_answers_score_one_and_key_order_only_matters_for_exact(frames):
    tasks = [Task("p", json.dumps(frame)) for frame in frames]
    assert set(score_tasks(tasks, [task.target for task in tasks]).to_dict().values()) <= {1.0, len(tasks)}
    turned = [json.dumps(dict(reversed(frame.items()))) for frame in frames]
    score = score_tasks(tasks, turned)
    assert (score.exact, score.frame, score.intent, score.slot_f1) == (0.0, 1.0, 1.0, 1.0)


def test_a_score_counted_by_hand():
    wanted = {"intent": "Play", "slots": {"artist": ["a", "b"], "year": "1"}}
    wrong_slot = {"intent": "Play", "slots": {"artist": "a", "year": "2"}}
    tasks = [Task("p", json.dumps(wanted))] * 4
    score = score_tasks(tasks, [json.dumps(wanted), json.dumps(wrong_slot), "not json", '{"intent": "Rate"}'])
    # Slots: 12 wanted, 3 + 2 given, 3 + 1 right.
    assert score.to_dict() == {"n": 4, "exact": 0.25, "frame": 0.25, "intent": 0.5, "slot_f1": 2 * 4 / 17}


def test_plain_text_targets_have_no_frame():
    assert score_tasks([Task("p", "yes")], ["yes"]).to_dict() == {
        "n": 1, "exact": 1.0, "frame": None, "intent": None, "slot_f1": None,
    }  # fmt: skip


def test_a_shape_is_parsed_with_its_defaults():
    assert parse_shape("hidden=64,heads=2,kv-heads=1,mlp=96") == StudentShape(64, 6, 2, 1, 96, 32)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("width=64", "'width'.* hidden, layers"),
        ("hidden=a", "hidden.*'a'"),
        ("layers=0", "layers.*'0'"),
        ("hidden=100,heads=4", "head=25.* 16|hidden=100.* 32"),
        ("hidden=192,heads=5", "heads=5"),
        ("heads=6,kv-heads=4", "heads=6.* 4"),
        ("mlp=100", "mlp=100.* 32"),
    ],
)
def test_a_bad_shape_is_refused(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_shape(text)


UTTERANCES = [
    Utterance("PlayMusic", ((None, "play "), ("artist", "Miles Davis"), (None, " on "), ("service", "spotify"))),
    Utterance("PlayMusic", (("artist", "Ella"), (None, " and "), ("artist", "Louis Armstrong"), (None, ", please."))),
    Utterance("GetWeather", ((None, "weather in "), ("city", "St. Ives"), (None, "?"))),
]


def test_an_answer_lists_a_slot_that_occurs_twice():
    assert UTTERANCES[1].to_task() == Task(
        "Ella and Louis Armstrong, please.",
        '{"intent": "PlayMusic", "slots": {"artist": ["Ella", "Louis Armstrong"]}}',
    )


def test_answers_are_spelled_by_their_pieces():
    pieces = answer_pieces(UTTERANCES)
    assert len(set(pieces)) == len(pieces)
    tokenizer = train_tokenizer([u.text for u in UTTERANCES], 400, pieces)
    for utterance in UTTERANCES:
        answer = utterance.to_task().target
        around = answer
        for _, value in utterance.slots:
            around = around.replace(value, "")
        tokens = tokenizer.encode(around, add_special_tokens=False).tokens
        assert set(tokens) <= set(pieces)
        assert tokenizer.decode(tokenizer.encode(answer, add_special_tokens=False).ids) == answer


chances = st.floats(0, 1)


@settings(max_examples=200)
@given(
    noise=st.builds(AugmentationRates, swap=chances, blend=chances, case=chances, mark=chances, polite=chances),
    seed=st.integers(0, 2**32),
    utterance=st.sampled_from(UTTERANCES),
)
def test_augmented_values_are_in_the_prompt(noise, seed, utterance):
    changed = Augmenter(UTTERANCES, noise)(utterance, np.random.default_rng(seed))
    task = changed.to_task()
    answer = json.loads(task.target)
    values = [v for value in answer["slots"].values() for v in (value if isinstance(value, list) else [value])]
    assert values
    assert all(value and value in task.prompt for value in values)
    assert answer["intent"] == utterance.intent
    assert [name for name, _ in changed.slots] == [name for name, _ in utterance.slots]


def test_no_noise_changes_nothing():
    augment = Augmenter(UTTERANCES, AugmentationRates(0, 0, 0, 0, 0))
    assert [augment(u, np.random.default_rng(0)) for u in UTTERANCES] == UTTERANCES


def test_courtesy_and_marks_do_not_change_values():
    augment = Augmenter(UTTERANCES, AugmentationRates(swap=0, blend=0, case=0, mark=1, polite=1))
    rng = np.random.default_rng(0)
    for utterance in UTTERANCES * 20:
        changed = augment(utterance, rng)
        assert changed.slots == utterance.slots
        assert changed.text != utterance.text


def test_case_changes_the_whole_sentence_alike():
    augment = Augmenter(UTTERANCES, AugmentationRates(swap=0, blend=0, case=1, mark=0, polite=0))
    rng = np.random.default_rng(0)
    texts = {augment(UTTERANCES[2], rng).text for _ in range(100)}
    assert texts == {
        "weather in st. ives?",
        "WEATHER IN ST. IVES?",
        "Weather In St. Ives?",
        "Weather in St. Ives?",
    }


def test_a_swap_takes_values_of_the_same_slot():
    augment = Augmenter(UTTERANCES, AugmentationRates(swap=1, blend=0, case=0, mark=0, polite=0))
    rng = np.random.default_rng(0)
    met = {value for _ in range(50) for name, value in augment(UTTERANCES[0], rng).slots if name == "artist"}
    assert met == {"Miles Davis", "Ella", "Louis Armstrong"}


def test_utterances_are_read_and_a_misplaced_slot_is_named(tmp_path: Path):
    path = tmp_path / "snips.jsonl"
    good = {
        "text": "play Ella",
        "intent": "PlayMusic",
        "slots": [{"name": "artist", "value": "Ella", "start": 5, "end": 9}],
    }
    path.write_text(json.dumps(good) + "\n")
    assert read_utterances(path) == [Utterance("PlayMusic", ((None, "play "), ("artist", "Ella")))]
    good["slots"][0]["start"] = 4
    path.write_text("\n" + json.dumps(good) + "\n")
    with pytest.raises(DataError, match=r"line 2: .*'artist'"):
        read_utterances(path)
