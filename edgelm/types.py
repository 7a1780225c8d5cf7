"""The messages that travel between the rooms: frozen, slotted dataclasses, validated where they are made.

Knows nothing of models, threads or wires. Ranges and defaults of the sampling parameters are stated here and
nowhere else.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from edgelm.errors import RequestError

FinishReason = Literal["stop", "length", "repetition", "cancelled", "deadline", "error"]

RANGES: Final[dict[str, tuple[float, float]]] = {
    "max_tokens": (1, 1_000_000),
    "temperature": (0.0, 100.0),
    "top_k": (0, 10_000_000),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, 20),
}
"""Allowed values of each number, both ends included."""

MAX_STOPS: Final = 16
"""How many stop strings a request may carry."""

Owner = str | None
"""Whose earlier work a request may use: a client's name, or None, an owner like any other."""

UNCACHED_OWNER: Final = ""
"""An owner that keeps nothing and finds nothing. No client's name is empty."""

MAX_SESSION_LENGTH: Final = 128
"""Characters of a session's name."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 are off.

    Raises `RequestError("bad_request")` when a value has the wrong type or lies outside `RANGES`.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    ignore_eos: bool = False
    repetition_guard: bool = True
    """Whether an answer ends, with `finish_reason` "repetition", once it repeats one passage over and over
    (`edgelm.engine.repetition`). Constrained answers and those with `ignore_eos` go on."""

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None and name == "seed":
                continue
            whole = isinstance(low, int)
            kinds = (int,) if whole else (int, float)
            finite = not isinstance(value, float) or math.isfinite(value)  # isfinite overflows on a huge int
            if isinstance(value, bool) or not isinstance(value, kinds) or not finite:
                raise RequestError("bad_request", f"{name} must be {'an integer' if whole else 'a number'}")
            if not low <= value <= high:
                raise RequestError("bad_request", f"{name} must lie in [{low}, {high}], got {value}")
        for name in ("ignore_eos", "repetition_guard"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError("bad_request", f"{name} must be true or false")
        if len(self.stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError("bad_request", f"stop must be at most {MAX_STOPS} non-empty strings")

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a copy with some values changed, validated again."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the answer must look like: a JSON schema, a regular expression, a Lark grammar, or one of some choices."""

    kind: Literal["json_schema", "regex", "lark", "choices"]
    value: str | tuple[str, ...]
    """JSON text of the schema, the pattern, the grammar, or the choices."""


def constraint_of(
    json_schema: Mapping[str, Any] | str | None, regex: str | None, choices: Sequence[str] | None
) -> Constraint | None:
    """Return the one constraint that is given. Raises `RequestError` for more than one or an empty list of choices."""
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
    """Return the choices. Raises `RequestError("bad_request")` for none and for a single text, which is no list."""
    found = tuple(choices) if isinstance(choices, Iterable) and not isinstance(choices, (str, bytes)) else ()
    if not found or not all(isinstance(choice, str) and choice for choice in found):
        raise RequestError(
            "bad_request", f'choices must be a list of non-empty strings, such as ["yes", "no"]; got {choices!r:.80}'
        )
    return found


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to answer: exactly one of `prompt`, `messages` and `tokens` is given, or none to end a session only."""

    id: str
    sampling: SamplingParams
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    tokens: tuple[int, ...] | None = None
    constraint: Constraint | None = None
    deadline: float | None = None
    """When to stop, in seconds of `time.monotonic`; None is never."""
    session: str | None = None
    """Name of the conversation that it goes on with or begins."""
    client: str | None = None
    """Whose session that is: each client's names are its own."""
    end_session: bool = False
    """Whether the session is forgotten after this request, even one that failed."""
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Descriptions of functions, for the chat template."""
    template_vars: Mapping[str, Any] | None = None
    """Further variables of the chat template, such as `enable_thinking`."""
    system: str | None = None
    """The system message that a conversation begins with."""
    raw: bool = False
    """Whether a prompt is completed as it stands, where it would be a user's message."""
    is_cache_isolated: bool = False
    """Whether it uses nothing that earlier requests computed, and leaves nothing to later ones. What the bundle brings
    along it uses."""

    def __post_init__(self) -> None:
        given = sum(given is not None for given in (self.prompt, self.messages, self.tokens))
        if given > 1 or (given == 0 and not self.end_session):
            raise RequestError("bad_request", "give exactly one of prompt, messages and tokens")
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise RequestError("bad_request", f"prompt: must be text, got {type(self.prompt).__name__}")
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
        """Whose earlier work it may use, and to whose it adds."""
        return UNCACHED_OWNER if self.is_cache_isolated else self.client

    @property
    def is_templated(self) -> bool:
        """Whether it brings something for the chat template besides messages."""
        return bool(self.tools) or bool(self.template_vars) or self.system is not None

    def chat(self, *, prompts_are_messages: bool) -> tuple[Mapping[str, Any], ...] | None:
        """Return the messages for the chat template, without `system`; None for a prompt that stays as it stands.

        A prompt is a user's message where the bundle says so, and where it has tools, variables or a system message.
        """
        if self.messages is None and self.prompt is not None and (self.is_templated or prompts_are_messages):
            return None if self.raw else ({"role": "user", "content": self.prompt},)
        return self.messages

    @property
    def is_end_session_only(self) -> bool:
        """Whether it only ends a session."""
        return self.prompt is None and self.messages is None and self.tokens is None


def is_session_name(value: object) -> bool:
    """Whether a session may be called so."""
    return isinstance(value, str) and 0 < len(value) <= MAX_SESSION_LENGTH and value.isprintable()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts: `cached_tokens` of the prompt were not computed again, `forced_tokens` of the answer not sampled."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    forced_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds from submission, and tokens per second from the first token to the last."""

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
        """Return the JSON form of interface and wire."""
        return {
            "token": self.token,
            "logprob": self.logprob,
            "top": [{"token": token, "logprob": logprob} for token, logprob in self.top],
        }


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `error` is set exactly when `finish_reason` is "error"."""

    id: str
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    timing: Timing = field(default_factory=Timing)
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: RequestError | None = None
    turn: int | None = None
    """Which answer of its session this is, from 1; None where it belongs to none."""

    @property
    def json(self) -> Any:
        """The answer parsed as JSON; None where it is not JSON."""
        try:
            return json.loads(self.text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
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
    """A piece of an answer. The last one has `done` and carries the whole `completion`; its delta may be empty.

    Deltas joined in order of `seq` equal `completion.text`.
    """

    id: str
    seq: int
    delta: str
    token: int | None
    done: bool = False
    completion: Completion | None = None
