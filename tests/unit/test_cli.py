"""The command line: usage, errors, and the commands info, eval, bench and chat."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from edgelm.cli import COMMANDS, main
from edgelm.cli.flags import _system

PROMPT = "Once upon a time"


def edgelm(*arguments, stdin="", **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "edgelm", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False, **options)


# --- all commands ---


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command, summary in COMMANDS.items():
        assert re.search(rf"^ +{command}\s+{summary.split()[0]} ", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["sing"], ["edgelm sing: ", "'sing'", "(edgelm --help)"]),
        (["expot"], ["edgelm expot: ", "'expot'", "did you mean export?"]),
        (["--verbose"], ["edgelm: ", "'--verbose'", "(edgelm --help)"]),
        (["--versio"], ["edgelm: ", "'--versio'", "did you mean --version?"]),
        (["generate"], ["edgelm generate: ", "BUNDLE", "(edgelm generate --help)"]),
        (["generate", "builtin", "a", "b"], ["edgelm generate: ", "'b'", "(edgelm generate --help)"]),
        (["bench", "b", "--bach=2"], ["'--bach=2'", "did you mean --batch?", "(edgelm bench --help)"]),
        (["devices", "smok"], ["did you mean smoke?", "(edgelm devices --help)"]),
        (["devices", "smoke", "--bokr", "x"], ["'--bokr'", "did you mean --broker?"]),
        (["export", "a", "b", "--quant", "int3"], [") (edgelm export --help)"]),  # the message lists all of them
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_line(arguments, facts, run):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    for fact in facts:
        assert fact in err
    assert err.count("\n") == 1


def test_a_system_message_is_a_text_or_a_file(tmp_path, bundle, run):
    (tmp_path / "system.txt").write_text("Be brief.\n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff")
    for given, kept in (("Be brief.", "Be brief."), (tmp_path / "system.txt", "Be brief."), ("x" * 9999, "x" * 9999)):
        assert _system(str(given)) == kept
    for name in ("absent.txt", "bytes.txt"):
        code, out, err = run("generate", bundle, "hi", "--system", tmp_path / name)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "--system" in err
        assert name in err


def test_without_a_command_there_is_help(run):
    assert run() == run("--help")
    assert run()[0] == 0


@pytest.mark.parametrize("command", ["generate", "info", "bench", "eval", "chat", "export", "serve", "ask"])
def test_an_unknown_option_is_refused_by_name(command, run):
    positional = {"generate": ["b", "p"], "export": ["a", "b"], "serve": [], "ask": ["p"]}.get(command, ["b"])
    code, out, err = run(command, *positional, "--no-such-option", "1")
    assert code == 2
    assert out == ""
    assert "--no-such-option" in err
    assert main([command, *positional, "--jso"]) == 2  # no abbreviations


def test_the_version_is_printed(run):
    code, out, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"edgelm \d+\.\d+\.\d+\S*\n", out)


@pytest.mark.parametrize(
    "arguments",
    [["generate", "{}", "hi"], ["info", "{}"], ["bench", "{}"], ["eval", "{}", "--text", __file__], ["chat", "{}"]],
    ids=lambda arguments: arguments[0],
)
def test_a_bad_bundle_is_one_line(arguments, tmp_path, run):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty"):
        code, out, err = run(*(argument.format(path) for argument in arguments))
        assert code == 1
        assert out == ""
        assert err.startswith(f"edgelm {arguments[0]}: ")
        assert err.count("\n") == 1
        assert str(path) in err


def test_debug_shows_the_traceback(tmp_path, run):
    assert "Traceback" not in run("info", tmp_path)[2]
    assert "Traceback" in run("info", tmp_path, "--debug")[2]


def test_a_graph_that_onnxruntime_refuses_is_one_line(bundle, tmp_path, run):
    from edgelm.bundle.bundle_folder import open_bundle, write_manifest

    for file in bundle.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    write_manifest(tmp_path, open_bundle(bundle).manifest)
    code, out, err = run("generate", tmp_path, PROMPT)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "model.onnx" in err or str(tmp_path) in err


def test_ctrl_c_that_caused_another_error_is_exit_code_130(monkeypatch, run):
    def load(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("edgelm.cli.info.open_bundle", load)
    import edgelm.cli.info  # noqa: F401  so that the patched module is used

    code, out, err = run("info", "builtin")
    assert (code, out, err.count("\n")) == (130, "", 1)


# --- info, eval, bench, chat ---


def test_info_prints_the_manifest(bundle, run):
    from edgelm.bundle.bundle_folder import open_bundle

    manifest = open_bundle(bundle).manifest
    code, out, err = run("info", bundle)
    assert (code, err) == (0, "")
    for value in (manifest.architecture, manifest.quant, f"{manifest.context} tokens", manifest.digest):
        assert value in out
    code, out, err = run("info", bundle, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    printed = json.loads(out)
    assert printed["context"] == manifest.context
    assert printed["digest"] == manifest.digest
    assert printed["bytes"] == sum(file.bytes for file in manifest.files.values())


def test_eval_measures_text_and_tasks(bundle, tmp_path, model):
    text, tasks = tmp_path / "text.txt", tmp_path / "tasks.jsonl"
    text.write_text("Once upon a time.\n<|endoftext|>\nThe cat sat on the mat.\n", "utf-8")
    said = model.generate(PROMPT, max_tokens=256, temperature=0.0).text
    rows = [{"prompt": PROMPT, "target": said or "x"}, {"prompt": "The cat", "target": "not this"}]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = edgelm("eval", bundle, "--text", text, "--task", tasks, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert {"perplexity", "bits_per_byte", "tokens", "task"} <= set(printed)
    assert {"n", "exact", "intent", "frame", "slot_f1"} <= set(printed["task"])
    assert (printed["task"]["n"], printed["task"]["exact"]) == (2, 0.5 if said else 0.0)
    assert printed["perplexity"] > 1


def test_eval_prints_a_table_and_the_number_of_cut_tokens(bundle, tmp_path, run):
    text = tmp_path / "long.txt"
    text.write_text("Once upon a time there was a cat. " * 60, "utf-8")
    code, out, err = run("eval", bundle, "--text", text, "--context", 64)
    assert code == 0
    assert re.search(r"^perplexity +\d", out, re.MULTILINE)
    assert re.search(r"^tokens +63$", out, re.MULTILINE)
    assert re.search(r"\b64\b", err)
    code, out, err = run("eval", bundle, "--text", text, "--context", 64, "--long-documents", "window", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["tokens"] > 63


def test_eval_refuses_missing_and_unreadable_files(bundle, tmp_path, run):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert run("eval", bundle)[0] == 2
    for option, path in (("--text", "nowhere"), ("--text", "bytes"), ("--text", "empty.txt"), ("--task", "empty.txt")):
        code, out, err = run("eval", bundle, option, tmp_path / path)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert "internal error" not in err


@pytest.mark.parametrize(("options", "lengths"), [([], (128, 128)), (["--new-tokens", "200"], (56, 200))])
def test_bench_fits_its_lengths_into_the_context(options, lengths, run):
    _, out, _ = run("bench", "builtin", "--repeat", "1", "--json", *options)
    (measured,) = json.loads(out)["runs"]
    assert (measured["prompt_tokens"], measured["new_tokens"]) == lengths


def test_bench_reports_every_batch(bundle, run):
    sizes = ["--prompt-tokens", 20, "--new-tokens", 5, "--repeat", 1, "--threads", 1]
    code, out, err = run("bench", bundle, *sizes, "--batch", "1,3", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    top = {"threads", "memory_bandwidth_gb_s", "load_s", "rss_mb", "rss_private_mb", "sampler_us", "runs"}
    assert top <= set(printed)
    each = {"batch", "prompt_tokens", "new_tokens", "prefill_tok_s", "decode_tok_s", "ttft_ms", "bandwidth_share"}
    assert [each <= set(run) for run in printed["runs"]] == [True, True]
    assert [run["batch"] for run in printed["runs"]] == [1, 3]
    assert all(run[name] > 0 for run in printed["runs"] for name in each)
    code, out, err = run("bench", bundle, *sizes)
    assert (code, err) == (0, "")
    assert "decode tok/s" in out


@pytest.mark.parametrize(
    ("options", "code"),
    [(["--batch", "1,x"], 2), (["--batch", "0"], 1), (["--new-tokens", "0"], 1), (["--prompt-tokens", "999999"], 1)],
    ids=str,
)
def test_bench_refuses_invalid_sizes(options, code, bundle, run):
    ended, out, err = run("bench", bundle, *options)
    assert (ended, out) == (code, "")
    assert "internal error" not in err


def test_chat_without_a_template_names_generate(bundle, tmp_path, run):
    import dataclasses

    from edgelm.bundle.bundle_folder import open_bundle, write_manifest

    for file in bundle.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    write_manifest(tmp_path, dataclasses.replace(open_bundle(bundle).manifest, chat_template=None))
    code, out, err = run("chat", tmp_path)
    assert (code, out) == (1, "")
    assert "edgelm generate" in err


# --- completion ---


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_prints_a_script_with_every_command(shell, run):
    pytest.importorskip("shtab", reason="needs pip install 'edgelm[completion]'")
    code, out, err = run("completion", shell)
    assert (code, err) == (0, "")
    assert all(command in out for command in COMMANDS)


def test_bash_completes_options(tmp_path, run):
    pytest.importorskip("shtab", reason="needs pip install 'edgelm[completion]'")
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    (tmp_path / "edgelm.bash").write_text(run("completion", "bash")[1])
    press_tab = 'source edgelm.bash; COMP_WORDS=(edgelm serve --max-b); COMP_CWORD=2; _shtab_edgelm; echo "$COMPREPLY"'
    done = subprocess.run(["bash", "-c", press_tab], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("--max-batch\n", "")
