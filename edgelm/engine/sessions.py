"""Named sessions, which go on from exactly the tokens that they have read and said: a client sends only what is new.

Holds tokens and texts, never key/value memory: that is found again in the tree of prefixes, or computed again.
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
"""Sessions that are kept. For one more, whoever has most of them loses the one that it used longest ago."""

BYTES_PER_TOKEN: Final = 24
"""What a session may take a token of the context, where that is more than the limit: its text twice, as the template
rendered it and in messages, and its tokens."""

_POINTER: Final = 32
"""About what a number in a tuple takes."""

SessionKey = tuple[str | None, str]
"""A client, and what it calls its session."""


@dataclass(frozen=True, slots=True)
class SessionState:
    """What was read and said up to some point.

    `messages` is None where it goes on as plain text. Else `text` is what the chat template made of them, answers as
    the model wrote them, and each of `boundaries` says how many characters of it are how many tokens.
    """

    tokens: Sequence[int] = ()
    turns: int = 0
    messages: tuple[Mapping[str, Any], ...] | None = None
    text: str = ""
    boundaries: tuple[tuple[int, int], ...] = ((0, 0),)
    message_bytes: int = 0
    """About how much memory the messages take, those included that the template leaves out of the text."""

    @property
    def bytes(self) -> int:
        """About how much memory it takes."""
        boundaries = 2 * _POINTER * len(self.boundaries)
        return array("i").itemsize * len(self.tokens) + sys.getsizeof(self.text) + boundaries + self.message_bytes

    def with_prompt(self, request: Request, tokenizer: Tokenizer, context: int | None = None) -> SessionState:
        """Return the conversation with a request's prompt behind it.

        Raises `RequestError("bad_request")` for a text that has no tokens, messages that the template refuses, messages
        after plain text and the reverse, another system message than the conversation began with, or a text that is
        too long for the `context`, as far as that is known before it is encoded.
        """
        chat = request.chat(prompts_are_messages=tokenizer.prompts_are_messages)
        if self.turns and (chat is None) != (self.messages is None):
            used, other = ("plain text", "messages") if self.messages is None else ("messages", "plain text")
            raise RequestError("bad_request", f"this session was begun with {used}: go on with it, not with {other}")
        if chat is not None:
            return self._ask_in_messages(self._opened(chat, request.system), request, tokenizer, context)
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
        """Return the conversation with an answer behind it, one that was cut off included."""
        whole = array("i", [*self.tokens, *tokens])  # kept for long: a fifth of a list's bytes
        if self.messages is None:
            return dataclasses.replace(self, tokens=whole, turns=self.turns + 1)
        decoder = StreamDecoder(tokenizer, self.tokens)  # without stop strings: they were said too
        said = "".join(map(decoder.push, tokens)) + decoder.finish()
        text = self.text + said
        answer = {"role": "assistant", "content": said}
        boundaries = (*self.boundaries, (len(text), len(whole)))
        return SessionState(
            whole, self.turns + 1, (*self.messages, answer), text, boundaries, self.message_bytes + _bytes_of(answer)
        )

    def _opened(self, chat: tuple[Mapping[str, Any], ...], system: str | None) -> tuple[Mapping[str, Any], ...]:
        """Return new messages behind a system message where the conversation begins with it."""
        if system is None:
            return chat
        opening = {"role": "system", "content": system}
        if not self.messages:
            if chat and chat[0].get("role") == "system":
                raise RequestError("bad_request", "system: the messages begin with a system message of their own")
            return opening, *chat
        if self.messages[0] != opening:
            raise RequestError(
                "bad_request", "system: this session was begun without it or with another: end the session to change it"
            )
        return chat

    def _ask_in_messages(
        self, new: tuple[Mapping[str, Any], ...], request: Request, tokenizer: Tokenizer, context: int | None
    ) -> SessionState:
        """Render the whole conversation, and encode what does not agree with the text known so far.

        A template that renders the past otherwise than before (one that leaves out earlier thoughts, say) costs the
        tokens from there on: they are encoded from their text.
        """
        if not new:
            raise RequestError("bad_request", "messages must hold at least one message")
        earlier = self.messages or ()
        messages = (*earlier, *new)
        prompt = tokenizer.build_prompt(messages, request.tools, request.template_vars)
        kept = self._kept(prompt.text)
        if earlier and kept < len(self.boundaries) - 1:  # templates that put a space before an answer expect it without
            bare = (*earlier[:-1], {**earlier[-1], "content": earlier[-1]["content"].strip()}, *new)
            other = tokenizer.build_prompt(bare, request.tools, request.template_vars)
            if self._kept(other.text) > kept:
                messages, prompt, kept = bare, other, self._kept(other.text)
        length, count = self.boundaries[kept]
        if context is not None:
            tokenizer.check_length(prompt.text[length:] if count else prompt.text, context)
        rest = tokenizer.encode_prompt(prompt.suffix_from(length) if count else prompt, is_continuation=count > 0)
        tokens = [*self.tokens[:count], *rest]
        boundaries = (*self.boundaries[: kept + 1], (len(prompt.text), len(tokens)))
        message_bytes = self.message_bytes + sum(map(_bytes_of, new))
        return SessionState(tokens, self.turns, messages, prompt.text, boundaries, message_bytes)

    def _kept(self, text: str) -> int:
        """Return the index of the last mark up to which a text is the one known so far."""
        return max(i for i, (length, _) in enumerate(self.boundaries) if text.startswith(self.text[:length]))


@dataclass(slots=True)
class _ActiveRequest:
    """A request that is being answered, what came before it, and that with its prompt behind it once that is known."""

    request: Request
    before: SessionState
    asked: SessionState | None = None
    ends: bool = False


class Sessions:
    """The sessions of one engine. Not thread-safe.

    Parameters
    ----------
    tokenizer
        That of the model.
    context
        Tokens that a request may hold, its answer included.
    max_sessions
        Sessions that are kept, of all clients.
    client_limits
        What one client may have of them.
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
        """Whether an earlier request of the same session is being answered."""
        name = _name_of(request)
        return name is not None and any(_name_of(turn.request) == name for turn in self._active.values())

    def begin_request(self, request: Request) -> SessionState:
        """Start a request of a session that answers no other, and return the session so far.

        `record_completion` must follow.
        """
        name = _name_of(request)
        if name is None:
            return SessionState()
        before = self._known.get(name, SessionState())
        self._active[request.id] = _ActiveRequest(request, before, ends=request.end_session)
        return before

    def append_prompt(self, before: SessionState, request: Request) -> SessionState:
        """Return a conversation with a request's prompt behind it. Callable from any thread.

        Raises `RequestError("bad_request")` as `SessionState.with_prompt` does, and where the session outgrows the
        context;
        `RequestError("too_large")` where it outgrows its bytes.
        """
        self._check_bytes(request, before)
        asked = before.with_prompt(request, self._tokenizer, self._context)
        if before.turns and len(asked.tokens) >= self._context:
            raise RequestError(
                "bad_request",
                f"this session has {len(before.tokens)} tokens, {len(asked.tokens)} with what is asked now, and the"
                f" context holds {self._context} with at least one for the answer: end the session to begin anew",
            )
        return asked

    def record_prompt(self, request: Request, asked: SessionState) -> list[int]:
        """Note what `asked` returned for a request, and return the tokens of its prompt, after those of its session."""
        turn = self._active.get(request.id)
        if turn is not None:
            turn.asked = asked
        return list(asked.tokens)

    def record_completion(self, chunk: Chunk) -> Chunk:
        """Remember the answer that a last chunk carries, and return the chunk with the answer's turn.

        An answer that failed leaves its session as it was.
        """
        completion = chunk.completion
        turn = None if completion is None else self._active.pop(chunk.id, None)
        name = None if turn is None else _name_of(turn.request)
        if completion is None or turn is None or name is None:
            return chunk
        if turn.asked is not None and completion.error is None:
            after = turn.asked.with_answer(completion.tokens, self._tokenizer)
            self._known[name] = after
            chunk = dataclasses.replace(chunk, completion=dataclasses.replace(completion, turn=after.turns))
        if name in self._known:
            self._known.move_to_end(name)
        if turn.ends:
            self._known.pop(name, None)
        self._make_room(name[0])
        return chunk

    def _check_bytes(self, request: Request, before: SessionState) -> None:
        """Raise `RequestError("too_large")` where a request makes its session larger than one may be."""
        limit = self._client_limits.session_bytes
        if limit is None or request.session is None:
            return
        limit = max(limit, BYTES_PER_TOKEN * self._context)
        more = sum(map(_bytes_of, request.messages or ())) + _bytes_of(request.prompt) + _bytes_of(request.system)
        if before.bytes + more > limit:
            raise RequestError(
                "too_large",
                f"this session takes {before.bytes} bytes, {before.bytes + more} with what is asked now, and one may"
                f" take {limit}: end the session to begin anew",
            )

    def _make_room(self, client: str | None) -> None:
        """Forget sessions until all limits hold, after one of a client was used."""
        own = [name for name in self._known if name[0] == client]
        if self._client_limits.sessions is not None:
            for name in own[: max(0, len(own) - self._client_limits.sessions)]:
                del self._known[name]
        while len(self._known) > self._max_sessions:
            self._forget_oldest(Counter(owner for owner, _ in self._known))
        limit = self._client_limits.all_sessions_bytes
        while limit is not None and len(self._known) > 1:
            sizes: Counter[str | None] = Counter()
            for (owner, _), known in self._known.items():
                sizes[owner] += known.bytes
            if sum(sizes.values()) <= limit:
                return
            self._forget_oldest(sizes)

    def _forget_oldest(self, held: Counter[str | None]) -> None:
        """Forget what was used longest ago of those who hold most."""
        most = max(held.values())
        del self._known[next(name for name in self._known if held[name[0]] == most)]

    def end_session(self, session: str, client: str | None = None) -> bool:
        """Forget a session, with the answer under way once that is whole; return whether there was one."""
        name = (client, session)
        turns = [turn for turn in self._active.values() if _name_of(turn.request) == name]
        for turn in turns:
            turn.ends = True
        return self._known.pop(name, None) is not None or bool(turns)

    def token_counts(self, client: str | None = None) -> dict[str, int]:
        """Return a client's sessions and their tokens, the least recently used first; one that begins has none yet."""
        begun = [_name_of(turn.request) for turn in self._active.values() if not turn.ends]
        lengths = {name: len(known.tokens) for name, known in self._known.items()}
        lengths |= {name: 0 for name in begun if name is not None and name not in lengths}
        return {session: count for (owner, session), count in lengths.items() if owner == client}


def _bytes_of(value: Any) -> int:
    """Return about how much memory a value out of JSON takes."""
    size, waiting = 0, [value]
    while waiting:
        each = waiting.pop()
        size += sys.getsizeof(each)
        if isinstance(each, Mapping):
            waiting += each.values()  # keys are few, and mostly shared
            size += sum(len(key) for key in each)
        elif isinstance(each, (list, tuple)):
            waiting += each
    return size


def _name_of(request: Request) -> SessionKey | None:
    return None if request.session is None else (request.client, request.session)
