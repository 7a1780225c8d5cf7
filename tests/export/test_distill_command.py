"""`edgelm distill`: students of data and of teachers, what is refused, and the built-in model's recipe."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'edgelm[distill]'")
pytest.importorskip("transformers", reason="pip install 'edgelm[distill]'")

import transformers
from edgelm_export.distill import builtin_recipe, distill
from edgelm_export.distill.distill import MAX_HELD_OUT, MIN_EXAMPLES_FOR_HOLD_OUT, split_held_out
from edgelm_export.distill.settings import BATCH_TOKENS_RANGE, EPOCHS_RANGE, MIN_STEPS, fit_settings
from hypothesis import given
from hypothesis import strategies as st

from edgelm.cli import main
from edgelm.errors import ConfigError
from edgelm.evaluation.tasks import Task

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Random sentences whose answer is their last word."""
    rng = np.random.default_rng(0)
    words = ["red", "green", "blue", "lamp", "door", "music", "stop", "start"]
    path = tmp_path_factory.mktemp("data") / "tasks.jsonl"
    rows = [list(rng.choice(words, 4)) for _ in range(80)]
    path.write_text("".join(json.dumps({"prompt": " ".join(row), "target": str(row[-1])}) + "\n" for row in rows))
    return path


SHAPE = "hidden=32,layers=1,heads=2,kv-heads=1,mlp=32"
QUICK = [
    "--held-out",
    "0",
    "--epochs",
    "2",
    "--batch-tokens",
    "256",
    "--row-length",
    "32",
    "--vocab-size",
    "300",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def student(tmp_path_factory, sentences):
    """A checkpoint directory made by the command, and a teacher for others."""
    out = tmp_path_factory.mktemp("student") / "out"
    assert main(["distill", "--student", SHAPE, "--data", str(sentences), "--out", str(out), *QUICK]) == 0
    return out


def test_the_command_makes_a_checkpoint_that_transformers_opens_and_generates_from(student):
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    model = transformers.AutoModelForCausalLM.from_pretrained(student)
    inputs = tokenizer("red green lamp", return_tensors="pt")
    made = model.generate(**inputs, max_new_tokens=4)
    assert made.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "red green lamp"}], tokenize=True)
    assert chat == tokenizer("red green lamp")["input_ids"]
    assert not student.with_name("out.partial").exists()


def test_a_student_is_distilled_from_a_teacher_with_its_tokenizer(tmp_path, sentences, student, capsys):
    out = tmp_path / "distilled"
    command = ["distill", "--teacher", str(student), "--student", SHAPE, "--data", str(sentences), "--out", str(out)]
    assert main([*command, *QUICK, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["steps"] > 0
    assert main([*command, *QUICK, "--force", "--teacher-top-k", "0"]) == 0
    assert printed.err == ""
    assert (out / "tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


def test_a_student_continues_from_a_directory(tmp_path, sentences, student):
    out = tmp_path / "again"
    command = ["distill", "--student", str(student), "--data", str(sentences), "--out", str(out), *QUICK]
    assert main(command) == 0
    assert main(command) == 1  # OUT exists
    assert main([*command, "--force"]) == 0


def refusal(capsys, *options: str) -> str:
    assert main(["distill", *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_an_error_is_named_and_leaves_nothing(tmp_path, sentences, student, capsys):
    out, data = tmp_path / "out", str(sentences)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a"}\n')
    base = ("--out", str(out), "--student", SHAPE)
    assert "bad.jsonl line 2: 'target'" in refusal(capsys, *base, "--data", str(bad))
    assert "absent.jsonl" in refusal(capsys, *base, "--data", str(tmp_path / "absent.jsonl"))
    assert main(["distill", *base, "--data", data, "--loss", "kl"]) == 2
    assert "--teacher" in capsys.readouterr().err
    assert "teacher" in refusal(capsys, *base, "--data", data, "--teacher", str(tmp_path))
    assert "'nowhere'" in refusal(capsys, "--out", str(out), "--data", data, "--student", "nowhere")
    assert "row holds 4" in refusal(capsys, *base, "--data", data, "--row-length", "4", "--vocab-size", "300")
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_unfinished_run_is_kept_without_force_or_resume(tmp_path, sentences, capsys):
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    command = ["--out", str(out), "--student", SHAPE, "--data", str(sentences), *QUICK]
    error = refusal(capsys, *command)
    assert "--resume" in error
    assert "--force" in error
    assert main(["distill", *command, "--resume"]) == 0
    assert not (tmp_path / "out.partial").exists()


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path, sentences, student, capsys):
    other = tmp_path / "other"
    quick = [*QUICK[:-4], "--vocab-size", "290", "--threads", "1"]
    assert main(["distill", "--student", SHAPE, "--data", str(sentences), "--out", str(other), *quick]) == 0
    capsys.readouterr()
    options = ["--student", str(other), "--teacher", str(student), "--data", str(sentences)]
    assert "vocabulary" in refusal(capsys, *options, "--out", str(tmp_path / "out"), *quick)


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    """Commands in the form of the SNIPS data: two intents, three slots."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("snips") / "train.jsonl"
    rows = []
    for at in range(60):
        artist, city = rng.choice(["Ella", "Miles Davis", "Bach"]), rng.choice(["Rome", "Los Angeles"])
        head, name, value = ("play ", "artist", str(artist)) if at % 2 else ("weather in ", "city", str(city))
        slot = {"name": name, "value": value, "start": len(head), "end": len(head) + len(value)}
        rows.append({"text": head + value, "intent": "Play" if at % 2 else "Weather", "slots": [slot]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_recipe_makes_a_model_that_spells_json_in_few_tokens(tmp_path, utterances, capsys):
    out = tmp_path / "builtin"
    command = ["--data", str(utterances), "--dev", str(utterances), "--out", str(out), "--threads", "1"]
    assert (
        builtin_recipe.main([*command, "--shape", "hidden=64,layers=2,heads=2,kv-heads=1,mlp=64", "--epochs", "2"]) == 0
    )
    dev = json.loads(capsys.readouterr().out)["dev"]
    assert dev["n"] == 60
    assert all(0 <= dev[name] <= 1 for name in ("exact", "frame", "intent", "slot_f1"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    answer = '{"intent": "Play", "slots": {"artist": "Ella"}}'
    spelled = tokenizer.encode(answer, add_special_tokens=False)
    assert tokenizer.decode(spelled, skip_special_tokens=True) == answer
    assert len(spelled) < 3 + len("Ella") + 1  # opening, name, end: one token each
    assert builtin_recipe.main([*command]) == 1
    assert "exists" in capsys.readouterr().err


# --- what is chosen where nothing is said ---


@given(
    lengths=st.lists(st.integers(2, 300), min_size=1, max_size=400),
    given_options=st.fixed_dictionaries(
        {}, optional={"epochs": st.integers(1, 99), "batch_tokens": st.integers(400, 9000), "lr": st.floats(1e-5, 0.1)}
    ),
)
def test_settings_fit_the_data_where_they_are_not_given(lengths, given_options):
    settings = fit_settings(lengths, given_options)
    assert max(lengths) <= settings.row_length < max(lengths) + 16
    for name, value in given_options.items():
        assert getattr(settings, name) == value
    steps = sum(lengths) / settings.batch_tokens * settings.epochs
    if "batch_tokens" not in given_options:
        assert max(BATCH_TOKENS_RANGE[0], settings.row_length) <= settings.batch_tokens
        assert settings.batch_tokens <= max(BATCH_TOKENS_RANGE[1], settings.row_length)
    if "epochs" not in given_options:
        assert EPOCHS_RANGE[0] <= settings.epochs <= EPOCHS_RANGE[1]
        assert settings.epochs in EPOCHS_RANGE or 0.5 * MIN_STEPS <= steps <= 2.5 * MIN_STEPS


@given(st.integers(1, 6000), st.one_of(st.none(), st.integers(-2, 6001)), st.integers(0, 9), st.integers(1, 3))
def test_held_out_prompts_are_drawn_once_and_never_trained_on(size, count, seed, times):
    tasks = [Task(str(i), str(again), i) for again in range(times) for i in range(size)]
    if count is not None and not 0 <= count < size:
        with pytest.raises(ConfigError, match="held-out"):
            split_held_out(tasks, count, seed)
        return
    kept, unseen = split_held_out(tasks, count, seed)
    assert {task.line for task in [*kept, *unseen]} == set(range(size))
    assert not {task.prompt for task in kept} & {task.prompt for task in unseen}
    assert len(kept) == times * (size - len(unseen))
    assert all(task.target == "0" for task in unseen)
    assert (kept, unseen) == split_held_out(tasks, count, seed)
    expected = (
        count if count is not None else (min(size // 10, MAX_HELD_OUT) if size >= MIN_EXAMPLES_FOR_HOLD_OUT else 0)
    )
    assert len(unseen) == expected


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Sentences made of parts, and the JSON that lists the parts: easy for a small student."""
    path = tmp_path_factory.mktemp("commands") / "tasks.jsonl"
    actions, devices, rooms = ("open", "close", "dim"), ("blinds", "light", "door"), ("kitchen", "garage", "attic")
    forms = ("{a} the {d} in the {r}", "please {a} the {r} {d}", "{a} {r} {d}", "the {r} {d}: {a} it")
    parts = itertools.product(forms, actions, devices, rooms)
    rows = [(form.format(a=a, d=d, r=r), json.dumps({"action": a, "device": d, "room": r})) for form, a, d, r in parts]
    path.write_text("".join(json.dumps({"prompt": prompt, "target": target}) + "\n" for prompt, target in rows))
    return path


def test_a_student_learns_the_task_with_default_settings(tmp_path, commands, capsys):
    out = tmp_path / "out"
    command = ["distill", "--student", "hidden=64,layers=2,heads=2,kv-heads=1,mlp=128", "--data", str(commands)]
    assert main([*command, "--out", str(out), "--vocab-size", "300", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith(f"{out}: ")
    score = re.fullmatch(r"held out: 10 examples: exact ([\d.]+)%, same JSON ([\d.]+)%", lines[1])
    assert float(score[2]) > 60
    assert printed.err == f"next: edgelm export {out} {out}-bundle --quant int8\n"


def test_a_run_that_learned_nothing_is_reported(tmp_path, commands, capsys):
    options = ["--student", SHAPE, "--data", str(commands), "--out", str(tmp_path / "out"), *QUICK, "--lr", "1e-7"]
    assert main(["distill", *options, "--row-length", "64", "--held-out", "9", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["held_out"]["exact"] == 0
    assert "--epochs" in printed.err
    assert printed.err.count("\n") == 1


def test_threads_are_measured(tmp_path, sentences, monkeypatch):
    """A machine on which two threads are slower than one, and four slower still."""
    seconds = {1: 2.0, 2: 1.0, 4: 5.0, 8: 0.1}
    chosen = [8]
    monkeypatch.setattr(distill.torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(distill.torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(distill, "_step_seconds", lambda *_: seconds[chosen[-1]])
    out = tmp_path / "out"
    assert main(["distill", "--student", SHAPE, "--data", str(sentences), "--out", str(out), *QUICK[:-2]]) == 0
    assert chosen == [8, 1, 2, 4, 2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--epochs", "0"], "epochs"),
        (["--batch-tokens", "-1"], "batch-tokens"),
        (["--row-length", "0"], "row-length"),
        (["--held-out", "80"], "held-out"),
        (["--held-out", "-1"], "held-out"),
        (["--threads", "0"], "threads"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path, sentences, capsys, options, named):
    base = ["--student", SHAPE, "--data", str(sentences), "--out", str(tmp_path / "out")]
    assert named in refusal(capsys, *base, *options)
    assert not (tmp_path / "out").exists()
