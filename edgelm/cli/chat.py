"""`edgelm chat`: a conversation on the terminal."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import edgelm
from edgelm.cli.flags import (
    add_loading_flags,
    add_sampling_flags,
    add_template_flags,
    loading_from,
    sampling_from,
    template_from,
)
from edgelm.cli.tables import explain_truncation, speed_text
from edgelm.errors import EdgelmError, RequestError
from edgelm.model import Model
from edgelm.sampling import load_kernels
from edgelm.system.progress_bar import Spinner
from edgelm.system.user_folders import user_folder
from edgelm.text.chat_template import check_messages
from edgelm.types import RANGES, Completion, SamplingParams

SAMPLING: Final[dict[str, Any]] = {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1}
"""How a chat samples where the checkpoint gave no defaults: without chance small models go round in circles."""

ANSWER_SHARE: Final = 4
"""One part in so many of the context is left for an answer: older turns make room."""

MAX_HISTORY_LINES: Final = 1000
"""Lines that the history file keeps."""

MAX_SAVED_BYTES: Final = 50_000_000
"""Of a saved conversation."""

QUOTES: Final = '"""'

HELP: Final = """\
/help              this
/system [TEXT]     show the system message, or set it and begin anew
/set [NAME VALUE]  show the sampling options, or set one, such as /set temperature 0.7
/regenerate        answer the last message again
/stats             tokens and speed of the last answer
/save FILE         write the conversation as JSON
/load FILE         go on from a saved conversation
/clear             forget what was said
/bye               end the chat, as Ctrl-D does
Ctrl-C stops an answer. A message of several lines stands between lines that begin and end with \"\"\"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"in the chat:\n{HELP}\nwhat was typed is kept in ~/.local/state/edgelm/chat_history"
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's directory, a name of `edgelm list`, or builtin")
    parser.add_argument("--verbose", action="store_true", help="show tokens and speed behind each answer")
    add_template_flags(parser)
    add_sampling_flags(parser)
    add_loading_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Read messages and commands until the end of input."""
    given, template = sampling_from(args), template_from(args)
    known = SamplingParams.__dataclass_fields__
    SamplingParams().replace(
        **{name: value for name, value in given.items() if name in known}
    )  # before anything is typed
    with Spinner("preparing the model for this processor"):
        model = edgelm.load(args.bundle, **loading_from(args), max_batch=1)
        sampling = {**_defaults(model), **given}
        if sampling.get("temperature", model.manifest.sampling.temperature) > 0:
            load_kernels()
    with model, _line_editing():
        if model.manifest.chat_template is None:
            raise EdgelmError(f"{args.bundle} has no chat template; `edgelm generate` continues plain text")
        chat = TerminalChat(model, template, sampling, is_verbose=args.verbose)
        if sys.stdin.isatty():
            print(_banner(model, args.bundle))
        for message in _read_inputs():
            if not chat.take(message):
                break
    return 0


@dataclass
class TerminalChat:
    """What was said, how answers are sampled, and the commands.

    The whole conversation is given to the model at each turn; what it has in common with the last one is not computed
    again.
    """

    model: Model
    template: dict[str, Any]
    sampling: dict[str, Any]
    is_verbose: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: Completion | None = None

    def take(self, line: str) -> bool:
        """Answer a message or follow a command; return whether the chat goes on."""
        command = re.match(r"/([A-Za-z]+)(?:\s+(.*))?$", line, re.DOTALL)
        if command is None:
            self._answer([*self.messages, {"role": "user", "content": line}])
            return True
        name, rest = command[1].lower(), (command[2] or "").strip()
        if name in {"bye", "exit", "quit"}:
            return False
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: print(HELP),
            "system": self._system,
            "set": self._set,
            "regenerate": lambda _: self._regenerate(),
            "stats": lambda _: print("nothing was answered yet" if self.last is None else speed_text(self.last)),
            "save": self._save,
            "load": self._load,
            "clear": lambda _: self.messages.clear(),
        }
        if name not in commands:
            meant = difflib.get_close_matches(name, [*commands, "bye"], n=1)
            _print_error(
                f"there is no /{name}; " + (f"did you mean /{meant[0]}?" if meant else "/help lists what there is")
            )
            return True
        try:
            commands[name](rest)
        except EdgelmError as error:
            _print_error(str(error))
        return True

    # --- answers ---

    def _answer(self, messages: list[dict[str, Any]]) -> None:
        """Answer the last of some messages; where that fails, the conversation stays as it was."""
        try:
            kept = self._fitted(messages)
            said = self._stream(kept)
        except RequestError as error:
            _print_error(str(error))
            return
        self.messages = [*kept, {"role": "assistant", "content": said}]

    def _stream(self, messages: list[dict[str, Any]]) -> str:
        """Print an answer as it comes; return what was said until it ended or was stopped."""
        said = []
        template = {name: value for name, value in self.template.items() if name != "system"}
        stream = self.model.stream(messages=self._opened(messages), **template, **self.sampling)
        try:
            for chunk in stream:
                print(chunk.delta, end="", flush=True)
                said.append(chunk.delta)
                self.last = chunk.completion or self.last
        except KeyboardInterrupt:
            print(" [stopped]")
            return "".join(said)
        finally:
            stream.close()  # type: ignore[attr-defined]
        print()
        if self.last is not None:
            told = explain_truncation(self.last, self.model.context)
            if told is not None:
                _print_error(told)
            if self.is_verbose:
                print(speed_text(self.last), file=sys.stderr)
        return "".join(said)

    def _opened(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages behind the system message, where there is one."""
        system = self.template.get("system")
        return messages if system is None else [{"role": "system", "content": system}, *messages]

    def _fitted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages without the oldest turns where all of them leave too little room for an answer."""
        context = self.model.context
        wanted = context // ANSWER_SHARE
        room = context - min(wanted, self.sampling.get("max_tokens", wanted))
        dropped, rest = 0, messages
        while len(rest) > 1 and self._tokens(rest) > room:
            following = (i for i, message in enumerate(rest[1:], 1) if message["role"] == "user")
            rest = rest[next(following, len(rest) - 1) :]
            dropped += 1
        if dropped:
            turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            _print_error(f"the context of {context} tokens is full: {turns} left out")
        return rest

    def _tokens(self, messages: list[dict[str, Any]]) -> int:
        tools, variables = self.template.get("tools"), self.template.get("template_vars")
        return len(self.model.message_tokens(self._opened(messages), tools=tools, template_vars=variables))

    # --- commands ---

    def _regenerate(self) -> None:
        asked = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None)
        if asked is None:
            raise EdgelmError("nothing was asked yet")
        self._answer(self.messages[: asked + 1])

    def _system(self, text: str) -> None:
        if not text:
            print(self.template.get("system") or "no system message")
            return
        self.template["system"] = text
        self.messages.clear()

    def _set(self, words: str) -> None:
        if not words:
            shown = {**_shown(self.model.manifest.sampling), **self.sampling, "verbose": self.is_verbose}
            print("\n".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in sorted(shown.items())))
            return
        name, _, text = words.partition(" ")
        try:
            value = json.loads(text)
        except ValueError:
            value = {"on": True, "off": False}.get(text.strip(), text.strip())
        if name == "verbose":
            if not isinstance(value, bool):
                raise EdgelmError("verbose is on or off")
            self.is_verbose = value
            return
        known = [*RANGES, "repetition_guard"]
        if name not in known:
            raise EdgelmError(f"/set takes {', '.join(sorted([*known, 'verbose']))}")
        SamplingParams(**{name: value})  # checks its type and range
        self.sampling[name] = value

    def _save(self, words: str) -> None:
        file = _file(words, "/save")
        if file.exists() and not _is_chat(file):
            raise EdgelmError(f"{file} is there, and no saved chat: give another name")
        saved = {"model": self.model.manifest.digest, "messages": self._opened(self.messages)}
        beside = file.with_name(f".{file.name}.new")
        try:
            beside.write_text(json.dumps(saved, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            beside.replace(file)
        except OSError as error:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise EdgelmError(f"{file} cannot be written: {error.strerror}") from error
        print(f"{len(self.messages)} messages written to {file}")

    def _load(self, words: str) -> None:
        file = _file(words, "/load")
        try:
            saved = _read(file)
        except OSError as error:
            raise EdgelmError(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise EdgelmError(f"{file} is not JSON: {error}") from error
        messages = saved.get("messages") if isinstance(saved, dict) else saved
        if not isinstance(messages, list):
            raise EdgelmError(f'{file} holds no conversation: it must be {{"messages": [...]}}, as /save writes it')
        check_messages(messages)
        if not all(isinstance(message.get("content"), str | list) for message in messages):
            raise EdgelmError(f"{file}: each message needs a content")
        rest = list(messages)
        if rest[0]["role"] == "system" and isinstance(rest[0].get("content"), str):
            self.template["system"] = rest.pop(0)["content"]
        else:
            self.template.pop("system", None)
        self.messages = rest
        print(f"{len(rest)} messages read from {file}")


def _read(file: Path) -> Any:
    """Return what a saved conversation holds. Raises `ValueError` for what is too large or no JSON, and `OSError`."""
    with file.open("rb") as stream:
        content = stream.read(MAX_SAVED_BYTES + 1)
    if len(content) > MAX_SAVED_BYTES:
        raise ValueError(f"it has more than {MAX_SAVED_BYTES / 1e6:.0f} MB")
    return json.loads(content.decode("utf-8-sig"))


def _is_chat(file: Path) -> bool:
    """Whether a file holds what /save writes."""
    try:
        saved = _read(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(saved, dict) and "messages" in saved


def _file(words: str, command: str) -> Path:
    """Return the one file that a command names; quotes may stand around it."""
    try:
        names = shlex.split(words)
    except ValueError:
        names = []
    if len(names) != 1:
        raise EdgelmError(f"{command} takes the name of one file")
    try:
        return Path(names[0]).expanduser()
    except RuntimeError as error:  # ~ without a home, ~somebody who is nobody here
        raise EdgelmError(f"{command}: {names[0]} names the home of nobody known here") from error


def _defaults(model: Model) -> dict[str, Any]:
    """Return what a chat samples with unless told otherwise: answers as long as the context allows."""
    bundle, plain = model.manifest.sampling, SamplingParams()
    given: dict[str, Any] = {}
    if bundle.max_tokens == plain.max_tokens:
        given["max_tokens"] = model.context
    if model.manifest.prompts_are_messages and bundle.temperature == 0 and bundle.repetition_penalty == 1:
        given |= SAMPLING
    return given


def _shown(sampling: SamplingParams) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in (*RANGES, "repetition_guard")}


def _banner(model: Model, name: str) -> str:
    m = model.manifest
    size = f"{m.parameters / 1e6:.0f} M" if m.parameters >= 10_000_000 else f"{m.parameters / 1e6:.2f} M"
    return (
        f"{Path(name).resolve().name}: {m.architecture}, {size} parameters in {m.quant}, context {model.context}\n"
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends the chat."
    )


def _read_inputs() -> Iterator[str]:
    """Yield what is typed, a message or a command at a time, until the end of input."""
    is_typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if is_typed else "").strip()
            if line.startswith(QUOTES):
                line = _read_multiline(line[len(QUOTES) :], is_typed)
        except EOFError:
            if is_typed:
                print()
            return
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError as error:
            raise EdgelmError(f"standard input is not text in {error.encoding}: {error.reason}") from error
        if line:
            yield line


def _read_multiline(begun: str, is_typed: bool) -> str:
    """Return a message of several lines, whose last one ends with three quotes."""
    lines = [begun]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(input("... " if is_typed else ""))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip()


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Let `input` edit lines and recall earlier ones, those of earlier chats too, where Python has readline."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:
        yield
        return
    file = user_folder("state") / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(MAX_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # no home, or one that cannot be written
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(file)


def _print_error(text: str) -> None:
    print(f"edgelm chat: {text}", file=sys.stderr, flush=True)
