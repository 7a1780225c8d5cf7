"""`edgelm distill`: students of data and of teachers, what is refused, and the built-in model's recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch", reason="pip install 'edgelm[distill]'")
pytest.importorskip("transformers", reason="pip install 'edgelm[distill]'")

import transformers
from edgelm_export.distill import builtin

from edgelm.cli import main

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
QUICK = ["--epochs", "2", "--batch-tokens", "256", "--row-length", "32", "--vocab-size", "300", "--threads", "1"]


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


def test_a_student_goes_on_from_a_directory(tmp_path, sentences, student):
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


def test_what_is_wrong_is_named_and_leaves_nothing(tmp_path, sentences, student, capsys):
    out, data = tmp_path / "out", str(sentences)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "a"}\n')
    base = ("--out", str(out), "--student", SHAPE)
    assert "bad.jsonl line 2: 'target'" in refusal(capsys, *base, "--data", str(bad))
    assert "absent.jsonl" in refusal(capsys, *base, "--data", str(tmp_path / "absent.jsonl"))
    assert main(["distill", *base, "--data", data, "--loss", "kl"]) == 2
    assert "needs --teacher" in capsys.readouterr().err
    assert "teacher" in refusal(capsys, *base, "--data", data, "--teacher", str(tmp_path))
    assert "neither a directory nor a shape" in refusal(
        capsys, "--out", str(out), "--data", data, "--student", "nowhere"
    )
    assert "a row holds 4" in refusal(capsys, *base, "--data", data, "--row-length", "4", "--vocab-size", "300")
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_remains_of_a_run_are_kept_until_told(tmp_path, sentences, capsys):
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()
    command = ["--out", str(out), "--student", SHAPE, "--data", str(sentences), *QUICK]
    assert "--resume goes on with it" in refusal(capsys, *command)
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
    assert builtin.main([*command, "--shape", "hidden=64,layers=2,heads=2,kv-heads=1,mlp=64", "--epochs", "2"]) == 0
    dev = json.loads(capsys.readouterr().out)["dev"]
    assert dev["n"] == 60
    assert all(0 <= dev[name] <= 1 for name in ("exact", "frame", "intent", "slot_f1"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    answer = '{"intent": "Play", "slots": {"artist": "Ella"}}'
    spelled = tokenizer.encode(answer, add_special_tokens=False)
    assert tokenizer.decode(spelled, skip_special_tokens=True) == answer
    assert len(spelled) < 3 + len("Ella") + 1  # opening, name, end: one token each
    assert builtin.main([*command]) == 1
    assert "exists" in capsys.readouterr().err
