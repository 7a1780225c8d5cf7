"""`edgelm chat`: the conversation, its commands, a full context, and what a terminal shows."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

import edgelm
from edgelm.cli import chat as module
from edgelm.cli.chat import TerminalChat
from edgelm.types import SamplingParams

GREEDY = {"temperature": 0.0, "max_tokens": 6, "seed": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def chatty(model):
    """The model that runtime tests run, which must have a chat template."""
    if model.manifest.chat_template is None:
        pytest.skip("this bundle has no chat template")
    return model


@pytest.fixture
def chat(chatty):
    return TerminalChat(chatty, {}, dict(GREEDY))


def said(chat, role="assistant"):
    return [message["content"] for message in chat.messages if message["role"] == role]


def test_each_answer_sees_what_was_said(chat, chatty, capsys):
    for text in ("hello", "how are you"):
        assert chat.take(text)
    messages, answers = [], []
    for text in ("hello", "how are you"):
        messages.append({"role": "user", "content": text})
        answers.append(chatty.generate(messages=messages, **GREEDY).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert chat.messages == messages
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{answer}\n" for answer in answers)
    assert printed.err.count("the answer was cut after 6 tokens (--max-tokens)") == 2


def test_clear_forgets_and_regenerate_answers_again(chat):
    chat.take("hello")
    first = said(chat)
    chat.take("how are you")
    chat.take("/clear")
    assert chat.messages == []
    chat.take("hello")
    chat.take("/regenerate")
    assert said(chat) == first
    assert said(chat, "user") == ["hello"]


def test_a_system_message_opens_the_conversation(chat, chatty, capsys):
    chat.take("hello")
    chat.take("/system Be brief.")
    assert chat.messages == []
    chat.take("hello")
    opened = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert said(chat) == [chatty.generate(messages=opened, **GREEDY).text]
    capsys.readouterr()
    chat.take("/system")
    assert capsys.readouterr().out == "Be brief.\n"


def test_a_saved_conversation_goes_on(chat, chatty, tmp_path, capsys):
    chat.take("/system Be brief.")
    chat.take("hello")
    file = tmp_path / "with a space.json"
    chat.take(f"/save '{file}'")
    other = TerminalChat(chatty, {}, dict(GREEDY))
    other.take(f"/load '{file}'")
    assert (other.messages, other.template["system"]) == (chat.messages, "Be brief.")
    assert capsys.readouterr().err.count("edgelm chat: ") == 1, "the answer that was cut, and nothing else"
    for each in (chat, other):
        each.take("how are you")
    assert other.messages == chat.messages


def test_options_are_shown_and_set(chat, capsys):
    chat.take("/set temperature 0.5")
    chat.take("/set repetition_guard off")
    chat.take("/set verbose on")
    assert chat.sampling == {**GREEDY, "temperature": 0.5, "repetition_guard": False}
    chat.take("/set")
    shown = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert (shown["temperature"], shown["top_p"], shown["verbose"]) == ("0.5", "1.0", "true")
    chat.take("hello")
    assert "tok/s" in capsys.readouterr().err
    chat.take("/stats")
    assert "6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/sve x", "there is no /sve; did you mean /save?"),
        ("/frobnicate", "there is no /frobnicate; /help lists what there is"),
        ("/regenerate", "nothing was asked yet"),
        ("/set tempo 1", "/set takes"),
        ("/set temperature warm", "temperature must be a number"),
        ("/set top_p 2", "top_p must lie in [0.0, 1.0], got 2"),
        ("/set verbose 3", "verbose is on or off"),
        ("/save", "/save takes the name of one file"),
        ("/save 'a", "/save takes the name of one file"),
        ("/save /nowhere/at/all.json", "cannot be written: No such file"),
        ("/load /nowhere.json", "cannot be read: No such file"),
        ("/load /dev/zero", "more than 50 MB"),
        (f"/load {__file__}", "is not JSON"),
    ],
)
def test_a_wrong_command_is_one_line_and_loses_nothing(line, told, chat, capsys):
    assert chat.take(line)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("edgelm chat: ")
    assert told in printed.err
    assert printed.err.count("\n") == 1
    assert (chat.messages, chat.sampling) == ([], GREEDY)


@pytest.mark.parametrize(
    "text", ["5", "{}", '{"messages": 1}', "[]", '[{"role": 1}]', '[{"role": "user", "content": [1]}]']
)
def test_a_file_that_holds_no_conversation_is_refused(text, chat, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    chat.take("hello")
    before = list(chat.messages)
    capsys.readouterr()
    chat.take(f"/load {tmp_path / 'a.json'}")
    assert "edgelm chat: " in capsys.readouterr().err
    assert chat.messages == before


def test_a_path_is_a_message(chat):
    chat.take("/etc/passwd is what?")
    assert said(chat, "user") == ["/etc/passwd is what?"]


def test_a_full_context_drops_the_oldest_turns(bundle, chatty, capsys):
    assert chatty
    with edgelm.load(bundle, threads=1, max_batch=1, context=96) as small:
        chat = TerminalChat(small, {}, {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True})
        for number in range(8):
            chat.take(f"number {number} of the things to say")
        assert said(chat, "user")[-1] == "number 7 of the things to say"
        assert len(said(chat)) < 8
        assert chat.messages[0]["role"] == "user"
        printed = capsys.readouterr()
        assert "the context of 96 tokens is full: the oldest turn was left out" in printed.err
        assert len(small.message_tokens(chat.messages[:-1])) <= 96 - 12
        before = list(chat.messages)
        chat.take("far too long " * 60)
        assert "the prompt has" in capsys.readouterr().err
        assert chat.messages == before


def test_a_chat_samples_where_the_checkpoint_says_nothing(chatty):
    given = module._defaults(chatty)
    if chatty.manifest.sampling == SamplingParams() and chatty.manifest.prompts_are_messages:
        assert given == {"max_tokens": chatty.context, **module.SAMPLING}
    with edgelm.load("builtin") as commands:
        assert module._defaults(commands) == {"max_tokens": commands.context}


def test_lines_come_from_a_pipe(bundle, chatty):
    assert chatty
    lines = 'hello\n"""two\nlines"""\n/clear\nhello\n/bye\nnot read\n'
    command = [sys.executable, "-m", "edgelm", "chat", str(bundle), "--temperature", "0", "--regex", "[a-z]{6}"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    answers = done.stdout.splitlines()
    assert len(answers) == 3
    assert answers[0] == answers[2]


def test_a_terminal_has_a_banner_history_and_ctrl_c(tmp_path, bundle, chatty):
    """Ctrl-C stops an answer, Ctrl-D the chat; what was typed is recalled by the next chat."""
    assert chatty
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    options = ["--max-tokens", "100000", "--ignore-eos", "--temperature", "0"]
    command = [sys.executable, "-m", "edgelm", "chat", str(bundle), *options]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    try:
        shown = read_until(ours, b"> ")
        assert b"/help lists the commands" in shown
        os.write(ours, b"hello\n")
        shown = read_until(ours, b"hello\r\n").partition(b"hello\r\n")[2]
        if not shown:
            read_until(ours, b"")  # the answer begins
        process.send_signal(signal.SIGINT)
        read_until(ours, rb" \[stopped\]")
        os.write(ours, b"/stats\n")
        read_until(ours, rb"nothing was answered yet\r\n.*> ")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    history = tmp_path / "edgelm" / "chat_history"
    assert "hello" in history.read_text(encoding="utf-8").splitlines()
    assert history.stat().st_mode & 0o077 == 0


def read_until(descriptor, sign):
    """What a terminal shows until a pattern."""
    end, shown = time.monotonic() + 60, b""
    while not shown or not re.search(sign, shown, re.DOTALL):
        ready, _, _ = select.select([descriptor], [], [], max(0, end - time.monotonic()))
        assert ready, shown
        shown += os.read(descriptor, 4096)
    return shown


def test_saving_writes_what_loading_reads(chat, tmp_path):
    chat.take("hello")
    chat.take(f"/save {tmp_path / 'a.json'}")
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert saved["messages"] == chat.messages
    assert saved["model"] == chat.model.manifest.digest
