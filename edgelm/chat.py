"""Chat templates: messages to the prompt that a model was trained on.

Knows Jinja, sandboxed, as transformers sets it up. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from edgelm.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Template


class ChatTemplate:
    """A compiled chat template.

    Parameters
    ----------
    source
        A template, or several as transformers stores them, `[{"name": ..., "template": ...}]`: then "default"
        is used, or the only one.
    special_tokens
        Names that the template may use, such as `bos_token`, and their texts.

    Raises
    ------
    RequestError
        With code "internal" when the template is no valid Jinja, or several have no default.
    """

    def __init__(self, source: str | Sequence[Mapping[str, str]], special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._template = _compile(_choose(source))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the prompt of a conversation, up to where the assistant speaks.

        Parameters
        ----------
        messages
            Each with a `role` and usually `content`; at least one.

        Raises
        ------
        RequestError
            With code "bad_request" when the messages are not what the template takes.
        """
        if not messages:
            raise RequestError("bad_request", "messages must hold at least one message")
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise RequestError("bad_request", "each message must be an object with a string role and content")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # a template can raise anything; the sandbox only contains it
            text = " ".join(str(error).split())
            raise RequestError("bad_request", f"the model's chat template refuses the messages: {text}") from error


def _choose(source: str | Sequence[Mapping[str, str]]) -> str:
    if isinstance(source, str):
        return source
    named = {entry["name"]: entry["template"] for entry in source}
    if "default" in named:
        return named["default"]
    if len(named) == 1:
        return next(iter(named.values()))
    names = ", ".join(sorted(named)) or "none"
    raise RequestError("internal", f"the model has several chat templates and no default: {names}")


def _compile(source: str) -> Template:
    """Compile as transformers does, so that templates written for it work unchanged."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Allows `{% generation %}`, which marks what is trained on; here its body counts as it stands."""

        tags = {"generation"}  # noqa: RUF012  so jinja2 declares it

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise RequestError("internal", f"the model's chat template is not valid: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
