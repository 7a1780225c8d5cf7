"""The messages that packages exchange: frozen, slotted dataclasses, validated when they are created.

Knows nothing of models, threads or wire formats. Ranges and defaults of the sampling parameters are stated only here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from edgelm.errors import RequestError
from edgelm.validation import FieldError, Length, Range, check, field_ranges

FinishReason = Literal["stop", "length", "repetition", "cancelled", "deadline", "error"]

MAX_STOPS: Final = 16
"""Maximum number of stop strings of a request."""

Owner = str | None
"""Whose cached work a request may use: a client's name, or None, which is an owner like any other."""

UNCACHED_OWNER: Final = ""
"""The owner whose requests neither use nor fill a cache. No client has an empty name."""

MAX_SESSION_LENGTH: Final = 128
"""Maximum length of a session's name, in characters."""


def _option(default: float | None, summary: str) -> Any:
    """Declare a number of `SamplingParams`; `summary` is the help text of its command-line flag."""
    return field(default=default, metadata={"summary": summary})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 are off.

    The fields are also the options of `Model.generate` and the keys of an MQTT request. The command line has a flag for
    each number. Raises `RequestError("bad_request")` if a value has the wrong type or is out of range.
    """

    max_tokens: Annotated[int, Range(1, 1_000_000)] = _option(256, "maximum tokens of the answer; the default is 256")
    temperature: Annotated[float, Range(0.0, 100.0)] = _option(0.0, "0 is greedy")
    top_k: Annotated[int, Range(0, 10_000_000)] = _option(0, "sample from the N likeliest tokens; 0 is all")
    top_p: Annotated[float, Range(0.0, 1.0)] = _option(
        1.0, "sample from the likeliest tokens with total probability X; 1 is all"
    )
    min_p: Annotated[float, Range(0.0, 1.0)] = _option(
        0.0, "drop tokens less likely than X times the likeliest; 0 is none"
    )
    repetition_penalty: Annotated[float, Range(0.01, 100.0)] = _option(1.0, "above 1 reduces repetition; 1 is off")
    seed: Annotated[int, Range(0, 2**63 - 1)] | None = _option(None, "the same seed gives the same answer")
    stop: Annotated[tuple[Annotated[str, Length(1)], ...], Length(0, MAX_STOPS)] = ()
    logprobs: Annotated[int, Range(0, 20)] = _option(
        0, "log-probability of each token, with the N likeliest alternatives"
    )
    ignore_eos: bool = False
    repetition_guard: bool = True
    """Whether an answer that repeats one passage ends with `finish_reason` "repetition" (`engine.repetition_guard`). It
    does not apply to constrained answers and those with `ignore_eos`."""

    def __post_init__(self) -> None:
        try:
            check(self)
        except FieldError as error:
            raise RequestError("bad_request", str(error)) from error

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a copy with some values changed, validated again."""
        return dataclasses.replace(self, **changes)


RANGES: Final = {name: (limit.low, limit.high) for name, limit in field_ranges(SamplingParams).items()}
"""Allowed values of each number of `SamplingParams`, both ends included."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer must match: a JSON schema, a regular expression, a Lark grammar, or one of several choices."""

    kind: Literal["json_schema", "regex", "lark", "choices"]
    value: str | tuple[str, ...]
    """JSON text of the schema, the pattern, the grammar, or the choices."""


def make_constraint(
    json_schema: Mapping[str, Any] | str | None, regex: str | None, choices: Sequence[str] | None
) -> Constraint | None:
    """Return the given constraint, or None. Raises `RequestError` for more than one, or invalid choices."""
    found: list[Constraint] = []
    if json_schema is not None:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
        found.append(Constraint("json_schema", text))
    if regex is not None:
        found.append(Constraint("regex", regex))
    if choices is not None:
        found.append(Constraint("choices", check_choices(choices)))
    if len(found) > 1:
        raise RequestError("bad_request", "give at most one of json_schema, regex and choices")
    return found[0] if found else None


def check_choices(choices: object) -> tuple[str, ...]:
    """Return the choices as a tuple. Raises `RequestError("bad_request")` for an empty list or a plain string."""
    found = tuple(choices) if isinstance(choices, Iterable) and not isinstance(choices, (str, bytes)) else ()
    if not found or not all(isinstance(choice, str) and choice for choice in found):
        raise RequestError(
            "bad_request", f'choices must be a list of non-empty strings, such as ["yes", "no"]; got {choices!r:.80}'
        )
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """A request to answer: exactly one of `prompt`, `messages` and `tokens`, or none of them to only end a session."""

    id: str
    sampling: SamplingParams
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tokens: tuple[int, ...] | None = None
    constraint: Constraint | None = None
    deadline: float | None = None
    """Point in time at which to stop, in seconds of `time.monotonic`; None is never."""
    session: str | None = None
    """Name of the session that it continues or begins."""
    client: str | None = None
    """Name of the client. Each client has its own sessions."""
    end_session: bool = False
    """Whether the session ends after this request, even if the request fails."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Function descriptions for the chat template."""
    template_vars: Mapping[str, Any] | None = None
    """Further variables of the chat template, such as `enable_thinking`."""
    system: str | None = None
    """System message at the start of the conversation."""
    raw: bool = False
    """Whether a prompt is completed without the chat template."""
    is_cache_isolated: bool = False
    """Whether it neither uses what earlier requests computed nor leaves anything to later ones. It uses the bundle's
    static prefix."""

    def __post_init__(self) -> None:
        given = sum(given is not None for given in (self.prompt, self.messages, self.tokens))
        if given > 1 or (given == 0 and not self.end_session):
            raise RequestError("bad_request", "give exactly one of prompt, messages and tokens")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise RequestError("bad_request", f"prompt must be text, got {type(self.prompt).__name__}")
        if self.session is None and self.end_session:
            raise RequestError("bad_request", "end_session needs the name of a session")
        if self.session is not None and not is_session_name(self.session):
            raise RequestError("bad_request", f"session must be 1 to {MAX_SESSION_LENGTH} printable characters")
        if self.tokens is not None and self.is_templated:
            raise RequestError(
                "bad_request", "system, tools and template_vars go with a prompt or messages, not with tokens"
            )
        if self.raw and (self.prompt is None or self.is_templated):
            raise RequestError(
                "bad_request", "raw goes with a prompt, without messages, system, tools and template_vars"
            )

    @property
    def owner(self) -> Owner:
        """The owner of the cache entries that it may use and adds."""
        return UNCACHED_OWNER if self.is_cache_isolated else self.client

    @property
    def is_templated(self) -> bool:
        """Whether it has input for the chat template besides messages."""
        return bool(self.tools) or bool(self.template_vars) or self.system is not None

    def chat(self, *, prompts_are_messages: bool) -> tuple[Mapping[str, Any], ...] | None:
        """Return the messages for the chat template, without `system`; None for plain text or tokens.

        A prompt is a user message if `prompts_are_messages`, or if the request has tools, variables or a system
        message.
        """
        if self.messages is None and self.prompt is not None and (self.is_templated or prompts_are_messages):
            return None if self.raw else ({"role": "user", "content": self.prompt},)
        return self.messages

    @property
    def is_end_session_only(self) -> bool:
        """Whether it has nothing to answer and only ends a session."""
        return self.prompt is None and self.messages is None and self.tokens is None


def is_session_name(value: object) -> bool:
    """Return whether a value is a valid name of a session."""
    return isinstance(value, str) and 0 < len(value) <= MAX_SESSION_LENGTH and value.isprintable()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts. `cached_tokens` of the prompt were not computed, `forced_tokens` of the answer not sampled."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    forced_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds since submission, and tokens per second between the first token and the last."""

    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    tok_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token under the model's own distribution, and the likeliest alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of `--json` and of the MQTT protocol."""
        return {
            "token": self.token,
            "logprob": self.logprob,
            "top": [{"token": token, "logprob": logprob} for token, logprob in self.top],
        }


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True, slots=True)
class Completion:
    """A complete answer. `error` is set if and only if `finish_reason` is "error"."""

    id: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timing: Timing = field(default_factory=Timing)
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: RequestError | None = None
    turn: int | None = None
    """Number of the answer in its session, from 1; None without a session."""

    @property
    def json(self) -> Any:
        """The answer parsed as JSON; None if it is not JSON."""
        try:
            return json.loads(self.text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `--json` prints."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "usage": dataclasses.asdict(self.usage),
            "timing": {name: round(value, 3) for name, value in dataclasses.asdict(self.timing).items()},
            "logprobs": None if self.logprobs is None else [entry.to_dict() for entry in self.logprobs],
            "json": self.json,
            "turn": self.turn,
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. The last one has `done` and the whole `completion`; its delta may be empty.

    The deltas in order of `seq` concatenate to `completion.text`.
    """

    id: str
    seq: int
    delta: str
    token: int | None
    done: bool = False
    completion: Completion | None = None
