"""`edgelm generate`: output on stdout and stderr, and exit codes."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest

from edgelm import load as model_of
from edgelm.bundle.bundle_folder import open_bundle, write_manifest

PROMPT = "Once upon a time"
USAGE = {"prompt_tokens", "cached_tokens", "completion_tokens", "forced_tokens"}
TIMING = {"ttft_ms", "total_ms", "tok_s"}


def edgelm(*arguments, stdin="", **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "edgelm", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.fixture(scope="module")
def answer(model):
    return model.generate(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True)


def test_generate_streams_to_stdout_and_notes_go_to_stderr(bundle, answer):
    options = ["--max-tokens", "12", "--temperature", "0", "--ignore-eos"]
    command = [sys.executable, "-m", "edgelm", "generate", str(bundle), PROMPT, *options]
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)  # in bytes: an answer may hold \r
    assert (done.returncode, done.stdout.decode()) == (0, answer.text + "\n")
    assert re.fullmatch(rb"edgelm: .*\b12 tokens.*--max-tokens.*\n", done.stderr)


def test_generate_prints_one_json_object(bundle, answer):
    options = ["--max-tokens", 12, "--temperature", 0, "--ignore-eos", "--logprobs", 2, "--json"]
    done = edgelm("generate", bundle, "-", *options, stdin=PROMPT)
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert {"text", "tokens", "finish_reason", "usage", "timing", "logprobs", "json"} <= set(printed)
    assert (printed["text"], printed["tokens"]) == (answer.text, list(answer.tokens))
    assert printed["finish_reason"] == "length"
    assert set(printed["usage"]) >= USAGE
    assert printed["usage"]["completion_tokens"] == 12
    assert set(printed["timing"]) >= TIMING
    assert [entry["token"] for entry in printed["logprobs"]] == printed["tokens"]
    for entry in printed["logprobs"]:
        assert set(entry) == {"token", "logprob", "top"}
        assert [set(other) for other in entry["top"]] == [{"token", "logprob"}] * 2
    assert printed["json"] == answer.json


def test_generate_takes_tokens_and_every_sampling_flag(bundle, run):
    flags = ["--temperature", 0.9, "--top-k", 9, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1]
    flags += ["--seed", 3, "--stop", "zzzz", "--stop", "yyyy", "--max-tokens", 9, "--ignore-eos", "--json"]
    first = run("generate", bundle, "--tokens", "5,6,7", *flags)
    again = run("generate", bundle, "--tokens", "5,6,7", *flags)
    assert first[0] == again[0] == 0
    assert json.loads(first[1])["tokens"] == json.loads(again[1])["tokens"]
    assert json.loads(first[1])["usage"]["prompt_tokens"] == 3


def test_generate_follows_constraints(bundle, run, tmp_path):
    assert run("generate", bundle, PROMPT, "--choices", "yes,no", "--no-stream")[1].strip() in ("yes", "no")
    assert re.fullmatch("[0-9]{4}\n", run("generate", bundle, PROMPT, "--regex", "[0-9]{4}")[1])
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [{"on": true}, {"on": false}]}')
    code, out, _ = run("generate", bundle, PROMPT, "--json-schema", schema, "--json", "--max-tokens", 200)
    assert code == 0
    assert json.loads(out)["json"] in ({"on": True}, {"on": False})


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ([], 2, "--tokens"),
        (["p", "--tokens", "1"], 2, "--tokens"),
        (["--tokens", "1,x"], 2, "--tokens"),
        (["--tokens", "5,99999999"], 1, "99999999"),
        (["p", "--temperature", "warm"], 2, "--temperature"),
        (["p", "--temperature", "-1"], 1, "temperature"),
        (["p", "--max-tokens", "0"], 1, "max_tokens"),
        (["p", "--top-p", "nan"], 1, "top_p"),
        (["p", "--seed", "-1"], 1, "seed"),
        (["p", "--regex", "("], 1, "regex"),
        (["p", "--regex", "a", "--choices", "b"], 2, "not allowed with"),
        (["p", "--json-schema", "/no/such/file"], 1, "/no/such/file"),
        (["p", "--context", "0"], 1, "context"),
        (["p", "--threads", "0"], 1, "threads"),
        (["\udcff"], 1, "Unicode"),
    ],
    ids=lambda value: "-".join(value).encode("ascii", "replace").decode() if isinstance(value, list) else None,
)
def test_generate_refuses_invalid_arguments(arguments, code, word, bundle, run):
    ended, out, err = run("generate", bundle, *arguments)
    assert (ended, out) == (code, "")
    assert word in err
    assert "internal error" not in err
    assert code == 2 or err.count("\n") == 1


def test_a_prompt_that_does_not_fit_states_both_lengths(bundle, run):
    code, out, err = run("generate", bundle, "--tokens", ",".join(["5"] * 33), "--context", 32)
    assert (code, out) == (1, "")
    assert "33 tokens" in err
    assert "32" in err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_input_that_is_not_text_is_one_line(errors, bundle):
    command = [sys.executable, "-m", "edgelm", "generate", str(bundle), "-"]
    env = {**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"}
    done = subprocess.run(command, input=b"\xff\xfe", capture_output=True, timeout=120, check=False, env=env)
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.count(b"\n") == 1
    assert b"internal error" not in done.stderr


def test_an_interrupt_is_exit_code_130(bundle):
    command = [sys.executable, "-m", "edgelm", "generate", str(bundle), "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            process.stdin.write(b"Once upon")
            process.stdin.flush()
            end = time.monotonic() + 60
            while count_unread(process.stdin):  # when the pipe is empty, the command waits for the rest of the prompt
                assert time.monotonic() < end
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
        assert process.stdout.read() == b""
        assert process.stderr.read().count(b"\n") == 1


def count_unread(pipe):
    return struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]


def test_a_closed_pipe_prints_no_error(bundle):
    command = [sys.executable, "-m", "edgelm", "generate", str(bundle), PROMPT, "--max-tokens", "300", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1
    assert err == b""
    process.stderr.close()


TEMPLATE = (
    "{{ messages[0].content }}{% if enable_thinking is false %} no{% endif %}"
    "{% if tools %}{{ tools[0].name }}{% endif %}{{ style }}"
)


def test_variables_and_tools_reach_the_chat_template(copied, run, tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "light"}]')
    write_manifest(copied, replace(open_bundle(copied).manifest, chat_template=TEMPLATE))
    options = ["--max-tokens", 1, "--temperature", 0, "--ignore-eos", "--json"]
    given = ["--template-var", "enable_thinking=false", "--template-var", "style=plain text", "--tools", tools]
    code, out, err = run("generate", copied, "Once upon", *options, *given)
    assert (code, err) == (0, "")
    with model_of(copied) as model:
        expected = model.generate(
            tokens=model.tokenizer.encode("Once upon nolightplain text", add_special_tokens=False),
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
        )
    printed = json.loads(out)
    assert printed["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert printed["tokens"] == list(expected.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--template-var", "enable_thinking"], "--template-var"),
        (["--template-var", "a b=1"], "'a b=1'"),
        (["--template-var", "messages=1"], "template_vars: messages"),
        (["--tools", "missing.json"], "missing.json"),
        (["--tools", __file__], __file__),
    ],
)
def test_invalid_template_options_are_one_line(copied, run, options, message):
    write_manifest(copied, replace(open_bundle(copied).manifest, chat_template=TEMPLATE))
    code, out, err = run("generate", copied, "Once", "--max-tokens", 1, *options)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_tools_that_are_not_a_list_are_refused(copied, run, tmp_path):
    (tmp_path / "tools.json").write_text('{"name": "light"}')
    code, _, err = run("generate", copied, "Once", "--tools", tmp_path / "tools.json")
    assert code == 1
    assert "--tools" in err
    assert err.count("\n") == 1
