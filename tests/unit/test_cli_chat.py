"""`edgelm chat`: the conversation, its commands, a full context, and the output on a terminal."""

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
    """The model of the runtime tests, if it has a chat template."""
    if model.manifest.chat_template is None:
        pytest.skip("this bundle has no chat template")
    return model


@pytest.fixture
def chat(chatty):
    return TerminalChat(chatty, {}, dict(GREEDY))


def contents(chat, role="assistant"):
    return [message["content"] for message in chat.messages if message["role"] == role]


def test_each_answer_depends_on_the_whole_conversation(chat, chatty, capsys):
    for text in ("hello", "how are you"):
        assert chat.handle_line(text)
    messages, answers = [], []
    for text in ("hello", "how are you"):
        messages.append({"role": "user", "content": text})
        answers.append(chatty.generate(messages=messages, **GREEDY).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert chat.messages == messages
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{answer}\n" for answer in answers)
    assert printed.err.count("--max-tokens") == printed.err.count("\n") == 2


def test_clear_starts_anew_and_regenerate_answers_again(chat):
    chat.handle_line("hello")
    first = contents(chat)
    chat.handle_line("how are you")
    chat.handle_line("/clear")
    assert chat.messages == []
    chat.handle_line("hello")
    chat.handle_line("/regenerate")
    assert contents(chat) == first
    assert contents(chat, "user") == ["hello"]


def test_a_system_message_opens_the_conversation(chat, chatty, capsys):
    chat.handle_line("hello")
    chat.handle_line("/system Be brief.")
    assert chat.messages == []
    chat.handle_line("hello")
    opened = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert contents(chat) == [chatty.generate(messages=opened, **GREEDY).text]
    capsys.readouterr()
    chat.handle_line("/system")
    assert capsys.readouterr().out == "Be brief.\n"


def test_a_saved_conversation_continues(chat, chatty, tmp_path, capsys):
    chat.handle_line("/system Be brief.")
    chat.handle_line("hello")
    file = tmp_path / "with a space.json"
    chat.handle_line(f"/save '{file}'")
    other = TerminalChat(chatty, {}, dict(GREEDY))
    other.handle_line(f"/load '{file}'")
    assert (other.messages, other.template["system"]) == (chat.messages, "Be brief.")
    assert capsys.readouterr().err.count("edgelm chat: ") == 1, "only the note that the answer was cut"
    for each in (chat, other):
        each.handle_line("how are you")
    assert other.messages == chat.messages


def test_options_are_shown_and_set(chat, capsys):
    chat.handle_line("/set temperature 0.5")
    chat.handle_line("/set repetition_guard off")
    chat.handle_line("/set verbose on")
    assert chat.sampling == {**GREEDY, "temperature": 0.5, "repetition_guard": False}
    chat.handle_line("/set")
    shown = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert (shown["temperature"], shown["top_p"], shown["verbose"]) == ("0.5", "1.0", "true")
    chat.handle_line("hello")
    assert "tok/s" in capsys.readouterr().err
    chat.handle_line("/stats")
    assert "6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("/sve x", ["/sve", "/save"]),
        ("/frobnicate", ["/frobnicate", "/help"]),
        ("/regenerate", []),
        ("/set tempo 1", ["temperature", "top_p", "verbose"]),
        ("/set temperature warm", ["temperature", "number"]),
        ("/set top_p 2", ["top_p", "0.0", "1.0", "2"]),
        ("/set verbose 3", ["verbose", "on", "off"]),
        ("/save", ["/save"]),
        ("/save 'a", ["/save"]),
        ("/save /nowhere/at/all.json", ["/nowhere/at/all.json", "No such file"]),
        ("/load /nowhere.json", ["/nowhere.json", "No such file"]),
        ("/load /dev/zero", ["/dev/zero", "50 MB"]),
        (f"/load {__file__}", [__file__, "JSON"]),
    ],
)
def test_a_wrong_command_is_one_line_and_changes_nothing(line, facts, chat, capsys):
    assert chat.handle_line(line)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("edgelm chat: ")
    assert all(fact in printed.err for fact in facts)
    assert printed.err.count("\n") == 1
    assert (chat.messages, chat.sampling) == ([], GREEDY)


@pytest.mark.parametrize(
    "text", ["5", "{}", '{"messages": 1}', "[]", '[{"role": 1}]', '[{"role": "user", "content": [1]}]']
)
def test_a_file_without_a_conversation_is_refused(text, chat, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    chat.handle_line("hello")
    before = list(chat.messages)
    capsys.readouterr()
    chat.handle_line(f"/load {tmp_path / 'a.json'}")
    assert "edgelm chat: " in capsys.readouterr().err
    assert chat.messages == before


def test_a_path_is_a_message(chat):
    chat.handle_line("/etc/passwd is what?")
    assert contents(chat, "user") == ["/etc/passwd is what?"]


def test_a_full_context_drops_the_oldest_turns(bundle, chatty, capsys):
    assert chatty
    with edgelm.load(bundle, threads=1, max_batch=1, context=96) as small:
        chat = TerminalChat(small, {}, {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True})
        for number in range(8):
            chat.handle_line(f"number {number} of the things to say")
        assert contents(chat, "user")[-1] == "number 7 of the things to say"
        assert len(contents(chat)) < 8
        assert chat.messages[0]["role"] == "user"
        printed = capsys.readouterr()
        assert "96 tokens" in printed.err
        assert len(small.message_tokens(chat.messages[:-1])) <= 96 - 12
        before = list(chat.messages)
        chat.handle_line("far too long " * 60)
        assert capsys.readouterr().err.startswith("edgelm chat: ")
        assert chat.messages == before


def test_a_chat_has_sampling_defaults_if_the_checkpoint_has_none(chatty):
    given = module._defaults(chatty)
    if chatty.manifest.sampling == SamplingParams() and chatty.manifest.prompts_are_messages:
        assert given == {"max_tokens": chatty.context, **module.CHAT_SAMPLING}
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
    """Ctrl-C stops an answer, Ctrl-D the chat; the input history is kept."""
    assert chatty
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    options = ["--max-tokens", "100000", "--ignore-eos", "--temperature", "0"]
    command = [sys.executable, "-m", "edgelm", "chat", str(bundle), *options]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    try:
        shown = read_until(ours, b"> ")
        assert b"/help" in shown
        os.write(ours, b"hello\n")
        shown = read_until(ours, b"hello\r\n").partition(b"hello\r\n")[2]
        if not shown:
            read_until(ours, b"")  # the answer begins
        process.send_signal(signal.SIGINT)
        read_until(ours, rb" \[stopped\]")
        os.write(ours, b"/stats\n")
        read_until(ours, rb"/stats\r\n.*\r\n.*> ")
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
    """Read a terminal until a pattern matches; return what it shows."""
    end, shown = time.monotonic() + 60, b""
    while not shown or not re.search(sign, shown, re.DOTALL):
        ready, _, _ = select.select([descriptor], [], [], max(0, end - time.monotonic()))
        assert ready, shown
        shown += os.read(descriptor, 4096)
    return shown


def test_saving_writes_what_loading_reads(chat, tmp_path):
    chat.handle_line("hello")
    chat.handle_line(f"/save {tmp_path / 'a.json'}")
    saved = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert saved["messages"] == chat.messages
    assert saved["model"] == chat.model.manifest.digest
