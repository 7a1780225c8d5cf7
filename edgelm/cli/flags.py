"""Flags that several commands share: how tokens are chosen, and how a broker is reached."""

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

FILES: Final = (".txt", ".md")
"""How one word ends that names a file, also one that is not there: no system message ends so."""


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that `sampling_from` reads; those not given leave the bundle's defaults."""
    group = parser.add_argument_group(
        "sampling",
        "defaults are the bundle's; if these are greedy, `edgelm chat` uses temperature 0.3, top-p 0.9 and repetition"
        " penalty 1.1; `edgelm chat` has no default limit of --max-tokens but the context",
    )
    for each in dataclasses.fields(SamplingParams):
        if each.name in RANGES:
            kind, metavar = (int, "N") if isinstance(RANGES[each.name][0], int) else (float, "X")
            flag = f"--{each.name.replace('_', '-')}"
            group.add_argument(flag, type=kind, metavar=metavar, help=each.metadata["summary"])
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on to --max-tokens")
    group.add_argument(
        "--no-repetition-guard",
        dest="repetition_guard",
        action="store_false",
        default=None,
        help="go on where an answer repeats one passage over and over",
    )
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="answer with JSON that fits this schema")
    form.add_argument("--regex", metavar="PATTERN", help="answer with text that matches")
    form.add_argument("--choices", metavar="A,B", help="answer with one of these")


def sampling_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling options that were given, by the names of `Model.generate` and of the MQTT protocol.

    Raises `ConfigError` when the schema file cannot be read.
    """
    names = (each.name for each in dataclasses.fields(SamplingParams))
    given = {name: getattr(args, name) for name in (*names, "regex")}
    if args.choices is not None:
        given["choices"] = [choice.strip() for choice in args.choices.split(",")]
    if args.json_schema is not None:
        given["json_schema"] = _schema(args.json_schema)
    return {name: value for name, value in given.items() if value is not None}


def add_template_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that `template_from` reads; `--raw` is the command's own."""
    group = parser.add_argument_group(
        "chat template", "where the model has one, a prompt is one message of the user; `edgelm info` says so"
    )
    group.add_argument(
        "--system", metavar="TEXT|FILE", help="the system message that the conversation begins with, or a file with it"
    )
    group.add_argument(
        "--template-var",
        action="append",
        metavar="K=V",
        help="a variable of the template, such as enable_thinking=false; V is JSON, else text; may be repeated",
    )
    group.add_argument("--tools", metavar="FILE", help="functions to offer: a JSON list, as OpenAI's API takes it")


def add_raw_flag(parser: argparse.ArgumentParser) -> None:
    """Declare the flag that leaves the chat template out."""
    parser.add_argument(
        "--raw", action="store_true", help="complete the prompt as it stands, without the model's chat template"
    )


def read_prompt(argument: str) -> str:
    """Return a prompt from the command line; `-` reads standard input, without the line ends behind it.

    Raises `EdgelmError` where standard input is not text.
    """
    if argument != "-":
        return argument
    try:
        return sys.stdin.read().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise EdgelmError(f"standard input is not text in {error.encoding}: {error.reason}") from error


def template_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return what was given for the chat template, by the names of `Model.generate` and of the MQTT protocol.

    Raises `ConfigError` for a variable without a value, and a file that cannot be read.
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
    """Return a text that is given as it is, or that of the file which it names. Raises `ConfigError`."""
    try:
        is_file = Path(value).is_file()
    except (OSError, ValueError):  # no name that a file can have, such as a long text
        return value
    if not is_file and not (value.endswith(FILES) and len(value.split()) == 1):
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
    """Declare how a bundle is loaded: `loading_from` reads it."""
    parser.add_argument("--context", type=int, metavar="N", help="tokens of prompt and answer together (the bundle's)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads (the cores, at most 4)")
    parser.add_argument(
        "--memory-limit-mb", type=int, metavar="N", help="refuse to load what would take more than N * 10^6 bytes"
    )
    add_cache_flag(parser)


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """Declare the flag that does without the board cache."""
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        default=None,
        help="do without weights and kernels made for this board (EDGELM_CACHE_DIR, else ~/.cache/edgelm): slower",
    )


def loading_from(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `edgelm.load` that were given."""
    given = {name: getattr(args, name) for name in ("context", "threads", "memory_limit_mb", "cache")}
    return {name: value for name, value in given.items() if value is not None}


def add_credential_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags by which a client proves who it is."""
    group = parser.add_argument_group("credentials", "the password comes from a file or from EDGELM_PASSWORD")
    group.add_argument("--username", metavar="NAME")
    group.add_argument("--password-file", metavar="FILE", help="its first line is the password; mode 0600")
    group.add_argument("--cafile", metavar="FILE", help="certificates to trust, for mqtts:// and wss://")
    group.add_argument("--certfile", metavar="FILE", help="our own certificate")
    group.add_argument("--keyfile", metavar="FILE", help="its key")


def broker_from(args: argparse.Namespace) -> BrokerConfig:
    """Return how to reach the broker of `--broker`; raise `ConfigError` where the flags do not fit."""
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
