"""`edgelm chat`: chat with a model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
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
    BUNDLE_HELP,
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
from edgelm.validation import suggest_match

CHAT_SAMPLING: Final[dict[str, Any]] = {"temperature": 0.3, "top_p": 0.9, "repetition_penalty": 1.1}
"""Sampling defaults for checkpoints that have none: with greedy decoding, small models repeat themselves."""

ANSWER_FRACTION: Final = 0.25
"""Fraction of the context that is reserved for an answer; the oldest turns are dropped to keep it free."""

MAX_HISTORY_LINES: Final = 1000
"""Length of the history file."""

MAX_SAVED_BYTES: Final = 50_000_000
"""Largest file that /load reads."""

QUOTES: Final = '"""'

HELP: Final = """\
/help              show this list
/system [TEXT]     show the system message, or set it and start a new conversation
/set [NAME VALUE]  show the sampling options, or set one, such as /set temperature 0.7
/regenerate        answer the last message again
/stats             tokens and speed of the last answer
/save FILE         write the conversation as JSON
/load FILE         continue a saved conversation
/clear             start a new conversation
/bye               end the chat (or Ctrl-D)
Ctrl-C stops an answer. A message of several lines begins and ends with \"\"\"."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"in the chat:\n{HELP}\nthe input history is stored in ~/.local/state/edgelm/chat_history"
    parser.add_argument("bundle", metavar="BUNDLE", help=BUNDLE_HELP)
    parser.add_argument("--verbose", action="store_true", help="show tokens and speed after each answer")
    add_template_flags(parser)
    add_sampling_flags(parser)
    add_loading_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Read messages and commands until the end of input."""
    given, template = sampling_from(args), template_from(args)
    known = SamplingParams.__dataclass_fields__
    # Checks the values before the model is loaded.
    SamplingParams().replace(**{name: value for name, value in given.items() if name in known})
    with Spinner("preparing the model for this processor"):
        model = edgelm.load(args.bundle, **loading_from(args), max_batch=1)
        sampling = {**_defaults(model), **given}
        if sampling.get("temperature", model.manifest.sampling.temperature) > 0:
            load_kernels()
    with model, _line_editing():
        if model.manifest.chat_template is None:
            raise EdgelmError(f"{args.bundle} has no chat template; `edgelm generate` completes plain text")
        chat = TerminalChat(model, template, sampling, is_verbose=args.verbose)
        if sys.stdin.isatty():
            print(_banner(model, args.bundle))
        for message in _read_inputs():
            if not chat.handle_line(message):
                break
    return 0


@dataclass
class TerminalChat:
    """A conversation, its sampling options, and the commands.

    Each turn passes the whole conversation to the model; the prefix cache holds its beginning.
    """

    model: Model
    template: dict[str, Any]
    sampling: dict[str, Any]
    is_verbose: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: Completion | None = None

    def handle_line(self, line: str) -> bool:
        """Answer a message or run a command; return whether the chat continues."""
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
            "stats": lambda _: print("there is no answer yet" if self.last is None else speed_text(self.last)),
            "save": self._save,
            "load": self._load,
            "clear": lambda _: self.messages.clear(),
        }
        if name not in commands:
            known = [f"/{command}" for command in (*commands, "bye")]
            suggestion = suggest_match(f"/{name}", known, 0.6, otherwise="; /help lists the commands")
            _print_error(f"there is no /{name}{suggestion}")
            return True
        try:
            commands[name](rest)
        except EdgelmError as error:
            _print_error(str(error))
        return True

    # --- answers ---

    def _answer(self, messages: list[dict[str, Any]]) -> None:
        """Answer the last message. If that fails, print the error and leave the conversation unchanged."""
        try:
            kept = self._drop_oldest_turns(messages)
            answer = self._stream(kept)
        except RequestError as error:
            _print_error(str(error))
            return
        self.messages = [*kept, {"role": "assistant", "content": answer}]

    def _stream(self, messages: list[dict[str, Any]]) -> str:
        """Print an answer as it arrives; return its text, also if it was stopped."""
        pieces = []
        template = {name: value for name, value in self.template.items() if name != "system"}
        stream = self.model.stream(messages=self._with_system_message(messages), **template, **self.sampling)
        try:
            for chunk in stream:
                print(chunk.delta, end="", flush=True)
                pieces.append(chunk.delta)
                self.last = chunk.completion or self.last
        except KeyboardInterrupt:
            print(" [stopped]")
            return "".join(pieces)
        finally:
            stream.close()  # type: ignore[attr-defined]
        print()
        if self.last is not None:
            truncation = explain_truncation(self.last, self.model.context)
            if truncation is not None:
                _print_error(truncation)
            if self.is_verbose:
                print(speed_text(self.last), file=sys.stderr)
        return "".join(pieces)

    def _with_system_message(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages, after the system message if there is one."""
        system = self.template.get("system")
        return messages if system is None else [{"role": "system", "content": system}, *messages]

    def _drop_oldest_turns(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages, without the oldest turns if the rest of the context is too short for an answer."""
        context = self.model.context
        reserved = int(context * ANSWER_FRACTION)
        room = context - min(reserved, self.sampling.get("max_tokens", reserved))
        dropped, rest = 0, messages
        while len(rest) > 1 and self._tokens(rest) > room:
            following = (i for i, message in enumerate(rest[1:], 1) if message["role"] == "user")
            rest = rest[next(following, len(rest) - 1) :]
            dropped += 1
        if dropped:
            turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            _print_error(f"the context of {context} tokens is full: {turns} dropped")
        return rest

    def _tokens(self, messages: list[dict[str, Any]]) -> int:
        tools, variables = self.template.get("tools"), self.template.get("template_vars")
        return len(self.model.message_tokens(self._with_system_message(messages), tools=tools, template_vars=variables))

    # --- commands ---

    def _regenerate(self) -> None:
        last_question = next(
            (i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] == "user"), None
        )
        if last_question is None:
            raise EdgelmError("there is no message yet")
        self._answer(self.messages[: last_question + 1])

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
                raise EdgelmError("verbose must be on or off")
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
            raise EdgelmError(f"{file} exists and is not a saved chat: choose another name")
        saved = {"model": self.model.manifest.digest, "messages": self._with_system_message(self.messages)}
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
            raise EdgelmError(f'{file} is not a saved conversation: expected {{"messages": [...]}}, as /save writes it')
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
    """Return the JSON value of a file. Raises `ValueError` if it is too large or not JSON, and `OSError`."""
    with file.open("rb") as stream:
        content = stream.read(MAX_SAVED_BYTES + 1)
    if len(content) > MAX_SAVED_BYTES:
        raise ValueError(f"it is larger than {MAX_SAVED_BYTES / 1e6:.0f} MB")
    return json.loads(content.decode("utf-8-sig"))


def _is_chat(file: Path) -> bool:
    """Return whether a file was written by /save."""
    try:
        saved = _read(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(saved, dict) and "messages" in saved


def _file(words: str, command: str) -> Path:
    """Return the file that is the only argument of a command; the name may be quoted."""
    try:
        names = shlex.split(words)
    except ValueError:
        names = []
    if len(names) != 1:
        raise EdgelmError(f"{command} takes the name of one file")
    try:
        return Path(names[0]).expanduser()
    except RuntimeError as error:  # `~` without a home directory, or `~user` of an unknown user
        raise EdgelmError(f"{command}: {names[0]} is in the home directory of an unknown user") from error


def _defaults(model: Model) -> dict[str, Any]:
    """Return the sampling defaults of a chat: answers may be as long as the context allows."""
    bundle, plain = model.manifest.sampling, SamplingParams()
    given: dict[str, Any] = {}
    if bundle.max_tokens == plain.max_tokens:
        given["max_tokens"] = model.context
    if model.manifest.prompts_are_messages and bundle.temperature == 0 and bundle.repetition_penalty == 1:
        given |= CHAT_SAMPLING
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
    """Yield each message or command until the end of input."""
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
    """Return a message of several lines; its last line ends with three quotes."""
    lines = [begun]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(input("... " if is_typed else ""))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip()


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Enable line editing and a history that is kept between chats, if Python has readline."""
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
        with contextlib.suppress(OSError):  # no home directory, or it is not writable
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(file)


def _print_error(text: str) -> None:
    print(f"edgelm chat: {text}", file=sys.stderr, flush=True)
