"""Flags that several commands share: sampling, chat template, loading, broker credentials."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from edgelm.errors import ConfigError, EdgelmError
from edgelm.mqtt.broker_config import BrokerConfig, BrokerUrl, read_password
from edgelm.types import RANGES, SamplingParams

BUNDLE_HELP: Final = "a bundle's directory, a name shown by `edgelm list`, or builtin"
THREADS_HELP: Final = "threads (default: the number of cores, at most 4)"

TEXT_FILE_SUFFIXES: Final = (".txt", ".md")
"""A --system value of one word with such a suffix is a file name, also if the file does not exist."""


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `sampling_from` reads; without a flag the bundle's default applies."""
    group = parser.add_argument_group(
        "sampling",
        "Defaults are the bundle's. `edgelm chat`: --max-tokens is the context; if the\n"
        "bundle is greedy, temperature 0.3, top-p 0.9 and repetition penalty 1.1.",
    )
    for option in dataclasses.fields(SamplingParams):
        if option.name in RANGES:
            kind, metavar = (int, "N") if isinstance(RANGES[option.name][0], int) else (float, "X")
            flag = f"--{option.name.replace('_', '-')}"
            group.add_argument(flag, type=kind, metavar=metavar, help=option.metadata["summary"])
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated")
    group.add_argument(
        "--ignore-eos", action="store_true", default=None, help="continue to --max-tokens after an end token"
    )
    group.add_argument(
        "--no-repetition-guard",
        dest="repetition_guard",
        action="store_false",
        default=None,
        help="do not stop an answer that repeats one passage",
    )
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="answer with JSON that matches this schema")
    form.add_argument("--regex", metavar="PATTERN", help="answer with text that matches this regular expression")
    form.add_argument("--choices", metavar="A,B", help="answer with one of these texts")


def sampling_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given sampling options under the names of `Model.generate` and of the MQTT protocol.

    Raises `ConfigError` if the schema file cannot be read.
    """
    names = (option.name for option in dataclasses.fields(SamplingParams))
    given = {name: getattr(args, name) for name in (*names, "regex")}
    if args.choices is not None:
        given["choices"] = [choice.strip() for choice in args.choices.split(",")]
    if args.json_schema is not None:
        given["json_schema"] = _schema(args.json_schema)
    return {name: value for name, value in given.items() if value is not None}


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `template_from` reads, except `--raw`."""
    group = parser.add_argument_group(
        "chat template", "if the model has one (`edgelm info`), a prompt is sent as one user message"
    )
    group.add_argument(
        "--system", metavar="TEXT|FILE", help="system message of the conversation, or a file that holds it"
    )
    group.add_argument(
        "--template-var",
        action="append",
        metavar="K=V",
        help="variable of the template, such as enable_thinking=false; V is JSON or else text; may be repeated",
    )
    group.add_argument(
        "--tools", metavar="FILE", help="functions for the model: a JSON list in the format of OpenAI's API"
    )


def add_raw_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--raw`, which disables the chat template."""
    parser.add_argument(
        "--raw", action="store_true", help="complete the prompt as plain text, without the chat template"
    )


def read_prompt(argument: str) -> str:
    """Return a prompt from the command line; `-` reads standard input and strips trailing line ends.

    Raises `EdgelmError` if standard input is not text.
    """
    if argument != "-":
        return argument
    try:
        return sys.stdin.read().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise EdgelmError(f"standard input is not text in {error.encoding}: {error.reason}") from error


def template_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given template options under the names of `Model.generate` and of the MQTT protocol.

    Raises `ConfigError` if a variable has no value or a file cannot be read.
    """
    given: dict[str, Any] = {}
    if args.system is not None:
        given["system"] = _system(args.system)
    if getattr(args, "raw", False):
        given["raw"] = True
    if args.template_var:
        given["template_vars"] = dict(map(_variable, args.template_var))
    if args.tools is not None:
        tools = _read_json("--tools", args.tools)
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ConfigError(f"--tools: {args.tools} is not a JSON list of objects")
        given["tools"] = tools
    return given


def _variable(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--template-var takes NAME=VALUE, such as enable_thinking=false; got {text!r:.80}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _system(value: str) -> str:
    """Return the text itself, or the content of the file that it names. Raises `ConfigError`."""
    try:
        is_file = Path(value).is_file()
    except (OSError, ValueError):  # not a valid file name, such as a long text
        return value
    if not is_file and not (value.endswith(TEXT_FILE_SUFFIXES) and len(value.split()) == 1):
        return value
    try:
        return Path(value).read_text("utf-8-sig").strip()
    except OSError as error:
        raise ConfigError(f"--system: cannot read {value}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--system: {value} is not a text file in UTF-8: {error.reason}") from error


def _schema(path: str) -> dict[str, Any]:
    schema = _read_json("--json-schema", path)
    if not isinstance(schema, dict):
        raise ConfigError(f"--json-schema: {path} is not a JSON object")
    return schema


def _read_json(name: str, path: str) -> Any:
    """Read the file of an option. Raises `ConfigError`."""
    try:
        return json.loads(Path(path).read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {path} is not JSON: {error}") from error


def add_loading_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `loading_from` reads."""
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of prompt and answer together (default: the bundle's)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help=THREADS_HELP)
    parser.add_argument(
        "--memory-limit-mb", type=int, metavar="N", help="refuse to load a model that needs more than N * 10^6 bytes"
    )
    add_cache_flag(parser)


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--no-cache`, which disables the board cache."""
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        default=None,
        help="do not use the board cache (prepacked weights, kernels; EDGELM_CACHE_DIR, else ~/.cache/edgelm): slower",
    )


def loading_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return the given options of `edgelm.load`."""
    given = {name: getattr(args, name) for name in ("context", "threads", "memory_limit_mb", "cache")}
    return {name: value for name, value in given.items() if value is not None}


def add_credential_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the broker's user, password and certificates."""
    group = parser.add_argument_group("credentials", "the password is read from a file or from EDGELM_PASSWORD")
    group.add_argument("--username", metavar="NAME", help="user at the broker (default: EDGELM_USERNAME)")
    group.add_argument("--password-file", metavar="FILE", help="file with the password in its first line; mode 0600")
    group.add_argument("--cafile", metavar="FILE", help="trusted certificates, for mqtts:// and wss://")
    group.add_argument("--certfile", metavar="FILE", help="client certificate")
    group.add_argument("--keyfile", metavar="FILE", help="private key of the client certificate")


def broker_from(args: argparse.Namespace) -> BrokerConfig:
    """Return the broker's URL and credentials. Raises `ConfigError` if the flags contradict each other."""
    password = read_password(args.password_file) if args.password_file else None
    username = args.username or os.environ.get("EDGELM_USERNAME")
    return BrokerConfig(
        url=BrokerUrl.parse(args.broker),
        username=username,
        password=password or os.environ.get("EDGELM_PASSWORD"),
        cafile=args.cafile,
        certfile=args.certfile,
        keyfile=args.keyfile,
    )
