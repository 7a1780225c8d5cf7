"""Named sessions, which go on from exactly the tokens that they have read and said: a client sends only what is new.

Holds tokens and texts, never key/value memory: that is found again in the tree of prefixes, or computed again.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from edgelm.errors import RequestError
from edgelm.messages import Chunk, Request
from edgelm.tokenizer import StreamDecoder, Tokenizer

MOST_SESSIONS: Final = 64
"""Sessions that are kept; the least recently used is forgotten for one more."""

Name = tuple[str | None, str]
"""A client, and what it calls its session."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was read and said up to some point.

    `messages` is None where it goes on as plain text. Else `text` is what the chat template made of them, answers as
    the model wrote them, and each of `marks` says how many characters of it are how many tokens.
    """

    tokens: Sequence[int] = ()
    turns: int = 0
    messages: tuple[Mapping[str, Any], ...] | None = None
    text: str = ""
    marks: tuple[tuple[int, int], ...] = ((0, 0),)

    def ask(self, request: Request, tokenizer: Tokenizer, context: int | None = None) -> Conversation:
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
            new = tokenizer.encode_further(request.prompt or "")
        else:
            new = tokenizer.encode(request.prompt or "")
        return dataclasses.replace(self, tokens=[*self.tokens, *new])

    def answer(self, tokens: tuple[int, ...], tokenizer: Tokenizer) -> Conversation:
        """Return the conversation with an answer behind it, one that was cut off included."""
        whole = array("i", [*self.tokens, *tokens])  # kept for long: a fifth of a list's bytes
        if self.messages is None:
            return dataclasses.replace(self, tokens=whole, turns=self.turns + 1)
        decoder = StreamDecoder(tokenizer, self.tokens)  # without stop strings: they were said too
        said = "".join(map(decoder.push, tokens)) + decoder.finish()
        text = self.text + said
        messages = (*self.messages, {"role": "assistant", "content": said})
        return Conversation(whole, self.turns + 1, messages, text, (*self.marks, (len(text), len(whole))))

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
    ) -> Conversation:
        """Render the whole conversation, and encode what does not agree with the text known so far.

        A template that renders the past otherwise than before (one that leaves out earlier thoughts, say) costs the
        tokens from there on: they are encoded from their text.
        """
        if not new:
            raise RequestError("bad_request", "messages must hold at least one message")
        earlier = self.messages or ()
        messages = (*earlier, *new)
        prompt = tokenizer.prompt_of(messages, request.tools, request.template_vars)
        kept = self._kept(prompt.text)
        if earlier and kept < len(self.marks) - 1:  # templates that put a space before an answer expect it without
            bare = (*earlier[:-1], {**earlier[-1], "content": earlier[-1]["content"].strip()}, *new)
            other = tokenizer.prompt_of(bare, request.tools, request.template_vars)
            if self._kept(other.text) > kept:
                messages, prompt, kept = bare, other, self._kept(other.text)
        length, count = self.marks[kept]
        if context is not None:
            tokenizer.check_length(prompt.text[length:] if count else prompt.text, context)
        rest = tokenizer.encode_prompt(prompt.after(length) if count else prompt, further=count > 0)
        tokens = [*self.tokens[:count], *rest]
        marks = (*self.marks[: kept + 1], (len(prompt.text), len(tokens)))
        return Conversation(tokens, self.turns, messages, prompt.text, marks)

    def _kept(self, text: str) -> int:
        """Return the index of the last mark up to which a text is the one known so far."""
        return max(i for i, (length, _) in enumerate(self.marks) if text.startswith(self.text[:length]))


@dataclass(slots=True)
class _Turn:
    """A request that is being answered, what came before it, and that with its prompt behind it once that is known."""

    request: Request
    before: Conversation
    asked: Conversation | None = None
    ends: bool = False


class Conversations:
    """The sessions of one engine. Not thread-safe.

    Parameters
    ----------
    tokenizer
        That of the model.
    context
        Tokens that a request may hold, its answer included.
    most
        Sessions that are kept.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, most: int = MOST_SESSIONS) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._most = most
        self._known: OrderedDict[Name, Conversation] = OrderedDict()
        self._turns: dict[str, _Turn] = {}

    def is_answering(self, request: Request) -> bool:
        """Whether an earlier request of the same session is being answered."""
        name = _name_of(request)
        return name is not None and any(_name_of(turn.request) == name for turn in self._turns.values())

    def begin(self, request: Request) -> Conversation:
        """Take a request, none of whose session is being answered, and return what was said; `settle` must follow."""
        name = _name_of(request)
        if name is None:
            return Conversation()
        before = self._known.get(name, Conversation())
        self._turns[request.id] = _Turn(request, before, ends=request.end_session)
        return before

    def asked(self, before: Conversation, request: Request) -> Conversation:
        """Return a conversation with a request's prompt behind it. Callable from any thread.

        Raises `RequestError("bad_request")` as `Conversation.ask` does, and where the session outgrows the context.
        """
        asked = before.ask(request, self._tokenizer, self._context)
        if before.turns and len(asked.tokens) >= self._context:
            raise RequestError(
                "bad_request",
                f"this session has {len(before.tokens)} tokens, {len(asked.tokens)} with what is asked now, and the"
                f" context holds {self._context} with at least one for the answer: end the session to begin anew",
            )
        return asked

    def read(self, request: Request, asked: Conversation) -> list[int]:
        """Note what `asked` returned for a request, and return the tokens of its prompt, after those of its session."""
        turn = self._turns.get(request.id)
        if turn is not None:
            turn.asked = asked
        return list(asked.tokens)

    def settle(self, chunk: Chunk) -> Chunk:
        """Remember the answer that a last chunk carries, and return the chunk with the answer's turn.

        An answer that failed leaves its session as it was.
        """
        completion = chunk.completion
        turn = None if completion is None else self._turns.pop(chunk.id, None)
        name = None if turn is None else _name_of(turn.request)
        if completion is None or turn is None or name is None:
            return chunk
        if turn.asked is not None and completion.error is None:
            after = turn.asked.answer(completion.tokens, self._tokenizer)
            self._known[name] = after
            chunk = dataclasses.replace(chunk, completion=dataclasses.replace(completion, turn=after.turns))
        if name in self._known:
            self._known.move_to_end(name)
        if turn.ends:
            self._known.pop(name, None)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return chunk

    def end(self, session: str, client: str | None = None) -> bool:
        """Forget a session, with the answer under way once that is whole; return whether there was one."""
        name = (client, session)
        turns = [turn for turn in self._turns.values() if _name_of(turn.request) == name]
        for turn in turns:
            turn.ends = True
        return self._known.pop(name, None) is not None or bool(turns)

    def lengths(self, client: str | None = None) -> dict[str, int]:
        """Return a client's sessions and their tokens, the least recently used first; one that begins has none yet."""
        begun = [_name_of(turn.request) for turn in self._turns.values() if not turn.ends]
        lengths = {name: len(known.tokens) for name, known in self._known.items()}
        lengths |= {name: 0 for name in begun if name is not None and name not in lengths}
        return {session: count for (owner, session), count in lengths.items() if owner == client}


def _name_of(request: Request) -> Name | None:
    return None if request.session is None else (request.client, request.session)
