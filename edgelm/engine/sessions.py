"""Named sessions: each continues from exactly the tokens that it has read and generated; a client sends only new text.

Holds tokens and texts, no keys and values: these come from the prefix cache, or are computed again.
"""

from __future__ import annotations

import dataclasses
import sys
from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edgelm.engine.fairness import NO_CLIENT_LIMITS, ClientLimits
from edgelm.errors import RequestError
from edgelm.text.tokenizer import StreamDecoder, Tokenizer
from edgelm.types import Chunk, Request

MAX_SESSIONS: Final = 64
"""Maximum number of sessions. For a further one, the client with the most loses its least recently used one."""

BYTES_PER_TOKEN: Final = 24
"""Bytes of a session that are always allowed for each token of the context: its text twice, rendered by the template
and in messages, and its tokens."""

_INTEGER_BYTES: Final = 32
"""Approximate size of an integer in a tuple."""

SessionKey = tuple[str | None, str]
"""A client and the name of its session."""


@dataclass(frozen=True, slots=True)
class SessionState:
    """Everything that a session has read and generated so far.

    `messages` is None if it consists of plain text. Otherwise `text` is the conversation as the chat template rendered
    it, with answers as the model generated them, and each pair (characters, tokens) of `boundaries` states that this
    many first characters of `text` are this many first tokens.
    """

    tokens: Sequence[int] = ()
    turns: int = 0
    messages: tuple[Mapping[str, Any], ...] | None = None
    text: str = ""
    boundaries: tuple[tuple[int, int], ...] = ((0, 0),)
    message_bytes: int = 0
    """Approximate memory of all messages, including those that the template omits."""

    @property
    def size_bytes(self) -> int:
        """Approximate memory in bytes."""
        boundaries = 2 * _INTEGER_BYTES * len(self.boundaries)
        return array("i").itemsize * len(self.tokens) + sys.getsizeof(self.text) + boundaries + self.message_bytes

    def with_prompt(self, request: Request, tokenizer: Tokenizer, context: int | None = None) -> SessionState:
        """Return the state with a request's prompt appended.

        Raises `RequestError("bad_request")` for messages that the template refuses, messages after plain text and the
        reverse, a system message that differs from the session's, or a text that is too long for `context`, as far as
        that is known before it is encoded.
        """
        chat = request.chat(prompts_are_messages=tokenizer.prompts_are_messages)
        if self.turns and (chat is None) != (self.messages is None):
            begun_with, given = ("plain text", "messages") if self.messages is None else ("messages", "plain text")
            raise RequestError("bad_request", f"this session began with {begun_with} and cannot continue with {given}")
        if chat is not None:
            return self._with_messages(self._with_system_message(chat, request.system), request, tokenizer, context)
        if context is not None:
            tokenizer.check_length(request.prompt or "", context)
        if request.tokens is not None:
            new = list(request.tokens)
        elif self.turns:
            new = tokenizer.encode_continuation(request.prompt or "")
        else:
            new = tokenizer.encode(request.prompt or "")
        return dataclasses.replace(self, tokens=[*self.tokens, *new])

    def with_answer(self, tokens: tuple[int, ...], tokenizer: Tokenizer) -> SessionState:
        """Return the state with an answer appended, even one that was cut off."""
        all_tokens = array("i", [*self.tokens, *tokens])  # a fifth of the size of a list
        if self.messages is None:
            return dataclasses.replace(self, tokens=all_tokens, turns=self.turns + 1)
        decoder = StreamDecoder(tokenizer, self.tokens)  # without stop strings, which belong to the text
        answer_text = "".join(map(decoder.push, tokens)) + decoder.finish()
        text = self.text + answer_text
        message = {"role": "assistant", "content": answer_text}
        boundaries = (*self.boundaries, (len(text), len(all_tokens)))
        return SessionState(
            all_tokens,
            self.turns + 1,
            (*self.messages, message),
            text,
            boundaries,
            self.message_bytes + _bytes_of(message),
        )

    def _with_system_message(
        self, chat: tuple[Mapping[str, Any], ...], system: str | None
    ) -> tuple[Mapping[str, Any], ...]:
        """Return new messages, preceded by the system message if the conversation starts with them."""
        if system is None:
            return chat
        system_message = {"role": "system", "content": system}
        if not self.messages:
            if chat and chat[0].get("role") == "system":
                raise RequestError("bad_request", "system: the messages already begin with a system message")
            return system_message, *chat
        if self.messages[0] != system_message:
            raise RequestError(
                "bad_request", "system: this session began with a different one or none: end the session to change it"
            )
        return chat

    def _with_messages(
        self, new: tuple[Mapping[str, Any], ...], request: Request, tokenizer: Tokenizer, context: int | None
    ) -> SessionState:
        """Render the whole conversation, and encode the part that differs from the current text.

        If the template renders earlier messages differently (for example omits earlier thoughts), the tokens from there
        on are encoded from their text.
        """
        if not new:
            raise RequestError("bad_request", "messages must hold at least one message")
        earlier = self.messages or ()
        messages = (*earlier, *new)
        prompt = tokenizer.build_prompt(messages, request.tools, request.template_vars)
        index = self._last_boundary(prompt.text)
        if earlier and index < len(self.boundaries) - 1:  # some templates add the space before an answer themselves
            stripped = (*earlier[:-1], {**earlier[-1], "content": earlier[-1]["content"].strip()}, *new)
            other = tokenizer.build_prompt(stripped, request.tools, request.template_vars)
            if self._last_boundary(other.text) > index:
                messages, prompt, index = stripped, other, self._last_boundary(other.text)
        length, count = self.boundaries[index]
        if context is not None:
            tokenizer.check_length(prompt.text[length:] if count else prompt.text, context)
        rest = tokenizer.encode_prompt(prompt.suffix_from(length) if count else prompt, is_continuation=count > 0)
        tokens = [*self.tokens[:count], *rest]
        boundaries = (*self.boundaries[: index + 1], (len(prompt.text), len(tokens)))
        message_bytes = self.message_bytes + sum(map(_bytes_of, new))
        return SessionState(tokens, self.turns, messages, prompt.text, boundaries, message_bytes)

    def _last_boundary(self, text: str) -> int:
        """Return the index of the last boundary up to which a text agrees with the current text."""
        return max(i for i, (length, _) in enumerate(self.boundaries) if text.startswith(self.text[:length]))


@dataclass(slots=True)
class _ActiveRequest:
    """An unfinished request of a session, and the session's state with its prompt as soon as it is known."""

    request: Request
    state_with_prompt: SessionState | None = None
    ends_session: bool = False


class Sessions:
    """The sessions of one engine. Not thread-safe.

    Parameters
    ----------
    tokenizer
        The bundle's tokenizer.
    context
        Maximum tokens of a request, including its answer.
    max_sessions
        Maximum number of sessions of all clients.
    client_limits
        Limits of one client.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context: int,
        max_sessions: int = MAX_SESSIONS,
        client_limits: ClientLimits = NO_CLIENT_LIMITS,
    ) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._max_sessions = max_sessions
        self._client_limits = client_limits
        self._known: OrderedDict[SessionKey, SessionState] = OrderedDict()
        self._active: dict[str, _ActiveRequest] = {}

    def is_session_busy(self, request: Request) -> bool:
        """Return whether an earlier request of the same session is unfinished."""
        name = _name_of(request)
        return name is not None and any(_name_of(active.request) == name for active in self._active.values())

    def begin_request(self, request: Request) -> SessionState:
        """Start a request whose session has no unfinished request; return the state of the session.

        `record_completion` must follow.
        """
        name = _name_of(request)
        if name is None:
            return SessionState()
        before = self._known.get(name, SessionState())
        self._active[request.id] = _ActiveRequest(request, ends_session=request.end_session)
        return before

    def append_prompt(self, before: SessionState, request: Request) -> SessionState:
        """Return the state with a request's prompt appended. Callable from any thread.

        Raises `RequestError("bad_request")` as `SessionState.with_prompt` does, and if the session becomes longer than
        the context; `RequestError("too_large")` if it exceeds its bytes.
        """
        self._check_bytes(request, before)
        state = before.with_prompt(request, self._tokenizer, self._context)
        if before.turns and len(state.tokens) >= self._context:
            raise RequestError(
                "bad_request",
                f"this session has {len(before.tokens)} tokens, {len(state.tokens)} with the new prompt, and the"
                f" context holds {self._context} with at least one for the answer: end the session to start over",
            )
        return state

    def record_prompt(self, request: Request, state: SessionState) -> list[int]:
        """Store the result of `append_prompt`; return its tokens, those of the session included."""
        active = self._active.get(request.id)
        if active is not None:
            active.state_with_prompt = state
        return list(state.tokens)

    def record_completion(self, chunk: Chunk) -> Chunk:
        """Store the completion of a last chunk in its session; return the chunk with the number of the answer.

        A failed request leaves its session unchanged.
        """
        completion = chunk.completion
        active = None if completion is None else self._active.pop(chunk.id, None)
        name = None if active is None else _name_of(active.request)
        if completion is None or active is None or name is None:
            return chunk
        if active.state_with_prompt is not None and completion.error is None:
            after = active.state_with_prompt.with_answer(completion.tokens, self._tokenizer)
            self._known[name] = after
            chunk = dataclasses.replace(chunk, completion=dataclasses.replace(completion, turn=after.turns))
        if name in self._known:
            self._known.move_to_end(name)
        if active.ends_session:
            self._known.pop(name, None)
        self._enforce_limits(name[0])
        return chunk

    def _check_bytes(self, request: Request, before: SessionState) -> None:
        """Raise `RequestError("too_large")` if a request makes its session larger than allowed."""
        limit = self._client_limits.session_bytes
        if limit is None or request.session is None:
            return
        limit = max(limit, BYTES_PER_TOKEN * self._context)
        new_bytes = sum(map(_bytes_of, request.messages or ())) + _bytes_of(request.prompt) + _bytes_of(request.system)
        if before.size_bytes + new_bytes > limit:
            raise RequestError(
                "too_large",
                f"this session takes {before.size_bytes} bytes, {before.size_bytes + new_bytes} with the new prompt;"
                f" the limit is {limit}: end the session to start over",
            )

    def _enforce_limits(self, client: str | None) -> None:
        """Remove sessions until all limits hold, after a client used one."""
        own = [name for name in self._known if name[0] == client]
        if self._client_limits.sessions is not None:
            for name in own[: max(0, len(own) - self._client_limits.sessions)]:
                del self._known[name]
        while len(self._known) > self._max_sessions:
            self._remove_oldest(Counter(owner for owner, _ in self._known))
        limit = self._client_limits.all_sessions_bytes
        while limit is not None and len(self._known) > 1:
            sizes: Counter[str | None] = Counter()
            for (owner, _), known in self._known.items():
                sizes[owner] += known.size_bytes
            if sum(sizes.values()) <= limit:
                return
            self._remove_oldest(sizes)

    def _remove_oldest(self, held: Counter[str | None]) -> None:
        """Remove the least recently used session of the clients that hold most."""
        most = max(held.values())
        del self._known[next(name for name in self._known if held[name[0]] == most)]

    def end_session(self, session: str, client: str | None = None) -> bool:
        """End a session, after its unfinished request if there is one; return whether it existed."""
        name = (client, session)
        unfinished = [active for active in self._active.values() if _name_of(active.request) == name]
        for active in unfinished:
            active.ends_session = True
        return self._known.pop(name, None) is not None or bool(unfinished)

    def token_counts(self, client: str | None = None) -> dict[str, int]:
        """Return the tokens of each of a client's sessions, the least recently used first; 0 for a new session."""
        unfinished = [_name_of(active.request) for active in self._active.values() if not active.ends_session]
        counts = {name: len(known.tokens) for name, known in self._known.items()}
        counts |= {name: 0 for name in unfinished if name is not None and name not in counts}
        return {session: count for (owner, session), count in counts.items() if owner == client}


def _bytes_of(value: Any) -> int:
    """Return the approximate memory of a JSON value."""
    size, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        size += sys.getsizeof(each)
        if isinstance(each, Mapping):
            waiting += each.values()  # the objects of keys are mostly shared
            size += sum(len(key) for key in each)
        elif isinstance(each, (list, tuple)):
            waiting += each
    return size


def _name_of(request: Request) -> SessionKey | None:
    return None if request.session is None else (request.client, request.session)
