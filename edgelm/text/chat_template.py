"""Chat templates: renders messages as the prompt format that a model was trained on.

Detects what a template accepts: content as text or as parts, a system message or none. `template_sandbox` limits time
and memory. Of the tokens it knows only the texts of the special ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from edgelm.errors import RequestError, TemplateLimitError
from edgelm.text.tainted_text import NONCHARACTERS, RenderedPrompt, SpecialTokenFinder, TaintTracker

if TYPE_CHECKING:
    from edgelm.text.template_sandbox import Template

Message = Mapping[str, Any]

LOG: Final = logging.getLogger(__name__)

PROBE: Final = "Quixotic zebras juggle"
"""Message text that detection renders and then searches for in the output."""

MAX_ERROR_LENGTH: Final = 300
"""Characters of a template's error that our error quotes."""

RESERVED_VARIABLES: Final = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Template variables that a request cannot set by name."""


class ChatTemplate:
    """A compiled chat template.

    Parameters
    ----------
    source
        A template, or several in the form of transformers, `[{"name": ..., "template": ...}]`: then "default" is used,
        or the only one.
    special_tokens
        Texts by the name that the template may use, such as `bos_token`.
    control
        Texts that are special tokens if the template writes them, and plain text if a message contains them.

    Raises
    ------
    RequestError
        With code "internal" if the template is not valid Jinja, or there are several without a default.
    """

    def __init__(
        self,
        source: str | Sequence[Mapping[str, str]],
        special_tokens: Mapping[str, str],
        control: Collection[str] = (),
    ) -> None:
        self._special_tokens = dict(special_tokens)
        self._special_token_finder = SpecialTokenFinder(control)
        self._template = _compile(_select_template(source))
        self._unusable: TemplateLimitError | None = None
        """Set once even a short message exceeds the limits."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        *,
        generation_prompt: bool = True,
    ) -> RenderedPrompt:
        """Return the prompt of a conversation, up to the start of the assistant's message.

        Parameters
        ----------
        messages
            At least one, each with a `role` and usually `content`: text or a list of parts
            `{"type": "text", "text": ...}`. If the template accepts no system message, its text is put before the text
            of the first user message.
        tools
            Descriptions of functions, for templates that use them.
        variables
            Other template variables, such as `enable_thinking`, with values of JSON types.
        generation_prompt
            Whether to append the start of an assistant message.

        Raises
        ------
        RequestError
            With code "bad_request" if the template refuses the messages, tools or variables are not valid, or the
            template exceeds a limit of `template_sandbox`.
        """
        check_messages(messages)
        options = {"tools": check_tools(tools), **self._check_variables(variables)}
        try:  # a template can raise any exception; values can be nested too deeply
            if self._unusable is not None:
                raise self._unusable
            given = self._adapt_messages(messages)
            tracker = TaintTracker(self._special_token_finder, [given, options])
            tainted = [
                {name: tracker.taint(value, ends=name != "role") for name, value in message.items()}
                for message in given
            ]
            return tracker.untaint(self._render(tainted, generation_prompt, tracker.taint(options)))
        except Exception as error:
            text = "".join(c for c in " ".join(str(error)[:MAX_ERROR_LENGTH].split()) if ord(c) not in NONCHARACTERS)
            raise RequestError("bad_request", f"the model's chat template refuses the messages: {text}") from error

    def _render(self, messages: Sequence[Message], generation_prompt: bool, options: Mapping[str, Any]) -> str:
        return self._template.render(
            {
                "messages": messages,
                "documents": None,
                "add_generation_prompt": generation_prompt,
                **self._special_tokens,
                **options,
            }
        )

    def _check_variables(self, variables: Mapping[str, Any] | None) -> Mapping[str, Any]:
        given = {} if variables is None else variables
        if not isinstance(given, Mapping):
            raise RequestError("bad_request", "template_vars must be an object")
        for name in given:
            if not isinstance(name, str) or not name.isidentifier():
                raise RequestError("bad_request", f"template_vars: {name!r:.80} is not a variable name")
            if name in RESERVED_VARIABLES or name in self._special_tokens:
                raise RequestError(
                    "bad_request", f"template_vars: {name} is set by the model, the messages or the tools"
                )
        return given

    # --- what the template accepts ---

    def _adapt_messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Return the messages in the form that the template accepts."""
        adapted = [_with_parsed_arguments(message) for message in messages]
        if any(isinstance(message.get("content"), list) for message in adapted) and not self._accepts_parts:
            adapted = [_with_text(message) for message in adapted]
        if adapted[0]["role"] == "system" and self._refuses_system:
            adapted = _merge_system(adapted)
        if self._accepts_parts and not self._accepts_text:
            adapted = [_with_parts(message) for message in adapted]
        return adapted

    @cached_property
    def _accepts_text(self) -> bool:
        return PROBE in (self._try_render([{"role": "user", "content": PROBE}]) or "")

    @cached_property
    def _accepts_parts(self) -> bool:
        """Whether content may be a list of parts, of which the template writes only the texts."""
        rendered = self._try_render([{"role": "user", "content": [{"type": "text", "text": PROBE}]}]) or ""
        return PROBE in rendered and "'text'" not in rendered

    @cached_property
    def _refuses_system(self) -> bool:
        """Whether the template raises an error for a system message but not for a user message alone.

        A template that silently omits the system message is used as it is, as in transformers.
        """
        content: Any = [{"type": "text", "text": PROBE}] if self._accepts_parts and not self._accepts_text else PROBE
        user = {"role": "user", "content": content}
        with_system = [{"role": "system", "content": content}, user]
        refuses = self._try_render(with_system) is None and self._try_render([user]) is not None
        if refuses:
            LOG.warning(
                "this model's chat template accepts no system message: its text is put before the first user message"
            )
        return refuses

    def _try_render(self, messages: Sequence[Message]) -> str | None:
        """Return the rendered messages; None if the template refuses them."""
        try:
            return self._render(messages, True, {"tools": None})
        except TemplateLimitError as error:  # later requests fail at once
            self._unusable = error
            raise
        except Exception:  # noqa: BLE001  a template can raise any exception
            return None


def check_messages(messages: Any) -> None:
    """Raise `RequestError("bad_request")` unless each message is an object with a role and textual content."""
    if not messages:
        raise RequestError("bad_request", "messages must have at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("bad_request", "each message must be an object with a string role and content")
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RequestError(
                    "bad_request",
                    'messages: a part of content must be {"type": "text", "text": "..."}; the model reads only text,'
                    f" got {part if kind in (None, 'text') else kind!s:.80}",
                )


def check_tools(tools: Any) -> list[Mapping[str, Any]] | None:
    """Return the tools as a list; None if there are none. Raises `RequestError("bad_request")` if not valid."""
    if tools is None:
        return None
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise RequestError("bad_request", "tools must be a list of objects, each a function with a name and parameters")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise RequestError(
                "bad_request", f"tools: each must be an object that describes a function, got {tool!r:.80}"
            )
    return list(tools) or None


def _with_parsed_arguments(message: Message) -> dict[str, Any]:
    """Return a message whose tool calls have arguments as objects: templates need objects, clients send JSON text."""
    calls = message.get("tool_calls")
    adapted = {name: list(value) if isinstance(value, tuple) else value for name, value in message.items()}
    if isinstance(calls, (list, tuple)):
        adapted["tool_calls"] = [_with_parsed_call(call) for call in calls]
    return adapted


def _with_parsed_call(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_parsed_call(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": value} if isinstance(value, dict) else call


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": _text_of(content)} if isinstance(content, list) else message


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _text_of(content: Any) -> str:
    """Return content as text; parts are joined without a separator, as templates that accept parts write them."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _merge_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with the text of the first one, the system message, before that of the first user message."""
    system, *rest = messages
    at = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if at is None:
        return [{**system, "role": "user"}, *rest]
    text = f"{_text_of(system.get('content'))}\n\n{_text_of(rest[at].get('content'))}"
    return [*rest[:at], {**rest[at], "content": text}, *rest[at + 1 :]]


def _select_template(source: str | Sequence[Mapping[str, str]]) -> str:
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
    from edgelm.text.template_sandbox import (
        Template as Compiled,  # imported here: Jinja is slow to import, and many models have no template
    )

    try:
        return Compiled(source)
    except ValueError as error:
        raise RequestError("internal", f"the model's chat template is not valid: {error}") from error
