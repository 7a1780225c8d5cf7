"""What `edgelm.load()` returns: text in, text out, from any thread."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.bundle_folder import Bundle
from edgelm.bundle.manifest import Manifest
from edgelm.engine.engine import Engine
from edgelm.engine.engine_options import DEFAULT_OPTIONS, EngineOptions
from edgelm.engine.worker import Worker
from edgelm.errors import RequestError
from edgelm.system.board_cache import BoardCache
from edgelm.text.chat_template import check_tools
from edgelm.text.tokenizer import Tokenizer
from edgelm.types import Chunk, Completion, Request, check_choices, make_constraint


def load(
    path: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    max_batch: int = DEFAULT_OPTIONS.max_batch,
    prefix_cache_mb: int = DEFAULT_OPTIONS.prefix_cache_mb,
    speculation: bool = True,
    cache: bool = True,
    memory_limit_mb: int | None = None,
) -> Model:
    """Open a bundle for inference.

    Parameters
    ----------
    path
        A directory that `edgelm export` wrote, or `"builtin"` for the model inside the package.
    threads
        Threads of one operator; the default is the number of cores, at most 4.
    context
        Tokens of prompt and answer together that one request may hold; the default and limit is the bundle's.
    max_batch
        Requests decoded together; more than that wait their turn.
    prefix_cache_mb
        Memory, in 10^6 bytes, for keys and values of earlier prompts and answers: what a prompt shares with one of them
        from the start on is not computed again. 0 is none.
    speculation
        Whether to guess tokens from what was said before, as long as that saves time. What guesses are kept is decided
        by the model, so answers are those without, but for rounding where two tokens are almost equally likely.
        Where a pass's length changes its rounding (on onnxruntime's kernels), requests with a seed make no use of
        guesses and of earlier prompts, so that a seed gives the same answer again; of a prefix that the bundle itself
        holds they do.
    cache
        Whether weights laid out for this processor, and kernels compiled for it, are kept between runs, in
        EDGELM_CACHE_DIR or ~/.cache/edgelm, and mapped from there: quicker to load and to run, and no private memory.
        It takes about 1.3 times the bundle's size on disk, three times where there are no kernels of our own; bundles
        below 16 MB do without.
    memory_limit_mb
        Most memory, in 10^6 bytes, that the process may come to take: weights, keys and values of requests as long as
        they may be, logits and the program itself are added up before anything is
        loaded (`edgelm.runtime.memory_plan`).

    Raises
    ------
    BundleError
        The bundle is missing, damaged, of a newer schema, or refused by onnxruntime.
    EdgelmError
        An option is out of range, or `memory_limit_mb` is too small; the message has the numbers.
    """
    options = EngineOptions(
        threads=threads,
        context=context,
        max_batch=max_batch,
        prefix_cache_mb=prefix_cache_mb,
        speculation=speculation,
        board_cache=BoardCache.default() if cache else None,
        memory_limit_mb=memory_limit_mb,
    )
    engine = Engine.open(path, options)
    worker = Worker(engine, queue_size=None)
    worker.start()
    return Model(engine.bundle, worker)


class Model:
    """A loaded bundle. Safe to call from several threads, whose requests are decoded together."""

    def __init__(self, bundle: Bundle, worker: Worker) -> None:
        self.bundle = bundle
        self.worker = worker
        self._ids = itertools.count()

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, which may be used from any thread."""
        return self.worker.tokenizer

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self.worker.context

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tokens: Sequence[int] | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        timeout_s: float | None = None,
        session: str | None = None,
        end_session: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        system: str | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> Completion:
        """Answer, and return the whole answer.

        Parameters
        ----------
        prompt, messages, tokens
            Exactly one: text, a conversation for the bundle's chat template, or token ids. Where the bundle has a chat
            template, a prompt is one message of the user (`Manifest.prompts_are_messages`). A message's content is
            text or a list of parts `{"type": "text", "text": ...}`; special tokens that it spells out are read as
            text. Messages of the role `tool` and `tool_calls` of the assistant go to the template as they are.
        json_schema, regex, choices
            At most one: what the answer must match. `choices` is a list, also where it holds one.
        timeout_s
            Seconds until the answer is cut off with `finish_reason` "deadline".
        session
            Name of a conversation, of 1 to 128 printable characters, which goes on from exactly the tokens that it has
            read and said: give only what is new. `prompt` is added as it stands (begin it with a space or a line break
            where one belongs), `tokens` too; `messages` are added to those before, of which the chat template renders
            the whole. A new name begins a conversation; `turn` of the completion is 1 then. An answer that was cut off
            is remembered as far as it came, without an end token; a request that fails leaves the session as it was.
            Requests of one session are answered one after another. The 64 that were used last are kept.
        end_session
            Whether to forget the session after this request, even one that fails.
        tools, template_vars
            Data for the bundle's chat template: descriptions of functions as most templates take them,
            `[{"type": "function", "function": {"name": ..., "parameters": ...}}]`, and further variables such as
            `{"enable_thinking": False}`.
        system
            The system message that the conversation begins with. A session keeps the one that it was begun with.
        raw
            Whether to complete `prompt` as it stands, without the chat template.
        **sampling
            Fields of `SamplingParams`; those not given are the bundle's defaults.

        Raises
        ------
        RequestError
            A value is out of range, the prompt (with its session) does not fit the context, or the step failed.
        """
        request = self._request(
            sampling,
            prompt=prompt,
            messages=messages,
            tokens=tokens,
            constraint=make_constraint(json_schema, regex, choices),
            timeout_s=timeout_s,
            session=session,
            end_session=end_session,
            tools=tools,
            template_vars=template_vars,
            system=system,
            raw=raw,
        )
        last = next(self._chunks(request, only_last=True))
        if last.completion is None:
            raise AssertionError("the last chunk carries the completion")
        return last.completion

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        tokens: Sequence[int] | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
        choices: Sequence[str] | None = None,
        timeout_s: float | None = None,
        session: str | None = None,
        end_session: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        system: str | None = None,
        raw: bool = False,
        **sampling: Any,
    ) -> Iterator[Chunk]:
        """Answer, and yield the answer as it grows; the last chunk is `done` and carries the completion.

        Leaving the loop early cancels the request. Parameters and errors are those of `generate`; a bad argument raises
        at once, before the first chunk is asked for.
        """
        request = self._request(
            sampling,
            prompt=prompt,
            messages=messages,
            tokens=tokens,
            constraint=make_constraint(json_schema, regex, choices),
            timeout_s=timeout_s,
            session=session,
            end_session=end_session,
            tools=tools,
            template_vars=template_vars,
            system=system,
            raw=raw,
        )
        return self._chunks(request)

    def end_session(self, name: str) -> bool:
        """Forget a session, after the answer it is giving; return whether there was one."""
        return self.worker.call(lambda engine: engine.end_session(name))

    def sessions(self) -> dict[str, int]:
        """Return the sessions that are kept and how many tokens each has, the least recently used first."""
        return self.worker.call(lambda engine: engine.session_token_counts())

    def score(self, text: str) -> NDArray[np.float64]:
        """Return the natural-log probability of each token of a text after its first, float64 [n - 1].

        The text starts with the bundle's start token, where it has one. Raises `RequestError` when it is longer than
        the context.
        """
        tokens = self.document_tokens(text)
        return self.worker.call(lambda engine: engine.score(tokens))

    def score_tokens(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Return the natural-log probability of each token after the first, float64 [n - 1]."""
        ids = list(tokens)
        return self.worker.call(lambda engine: engine.score(ids))

    def choose(self, prompt: str, choices: Sequence[str], *, raw: bool = False) -> tuple[str, float]:
        """Return the likeliest answer to a prompt, and its probability among the choices.

        Where the bundle has a chat template, the prompt is a message of the user and a choice the beginning of the
        answer; elsewhere, and with `raw`, a choice continues the prompt as it stands. A choice's probability is the
        product of its tokens', so a long one has more to lose. Raises `RequestError` for an empty prompt, no choice, an
        empty one, or one that does not fit the context.
        """
        choices = check_choices(choices)
        tokenizer = self.tokenizer
        is_message = tokenizer.prompts_are_messages and not raw
        asked = self.message_tokens([{"role": "user", "content": prompt}]) if is_message else tokenizer.encode(prompt)
        if not prompt or not asked:
            raise RequestError("bad_request", "the prompt is empty: there is nothing to continue")
        logprobs = []
        for choice in choices:
            together = [] if is_message else tokenizer.encode(prompt + choice)
            whole = together if together[: len(asked)] == asked else []  # the tokenizer may end a prompt
            if len(whole) <= len(asked):
                said = choice.lstrip(" ") or choice if is_message else choice
                whole = [*asked, *tokenizer.encode(said, add_special_tokens=False)]
            logprobs.append(float(self.score_tokens(whole)[len(asked) - 1 :].sum()))
        shares = np.exp(np.array(logprobs) - max(logprobs))
        best = int(shares.argmax())
        return choices[best], float(shares[best] / shares.sum())

    def message_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of the prompt that the chat template makes of a conversation.

        Raises `RequestError` when there is no template, or it refuses the messages.
        """
        tokenizer = self.tokenizer
        return tokenizer.encode_prompt(tokenizer.build_prompt(messages, tools, template_vars))

    def document_tokens(self, text: str) -> list[int]:
        """Return a text's tokens as a document: the start token, where there is one, then the bare text."""
        if not isinstance(text, str):
            raise RequestError("bad_request", f"the text must be text, got {type(text).__name__}")
        bare = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.manifest.bos_token
        return bare if bos is None else [bos, *bare]

    def close(self) -> None:
        """Stop the worker; requests under way end with the error "interrupted"."""
        self.worker.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sampling(self, given: Mapping[str, Any]) -> Any:
        defaults = self.manifest.sampling
        unknown = sorted(set(given) - set(defaults.__dataclass_fields__))
        if unknown:
            allowed = ", ".join(defaults.__dataclass_fields__)
            raise RequestError("bad_request", f"unknown option {unknown[0]!r}; allowed: {allowed}")
        stop = given.get("stop")
        if stop is not None:
            given = {**given, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        return defaults.replace(**{name: value for name, value in given.items() if value is not None or name == "seed"})

    def _request(
        self,
        sampling: Mapping[str, Any],
        *,
        messages: Sequence[Mapping[str, Any]] | None,
        tokens: Sequence[int] | None,
        timeout_s: float | None,
        tools: Sequence[Mapping[str, Any]] | None,
        **fields: Any,
    ) -> Request:
        """Return a request: lists as tuples, and the time that is left as a point in time."""
        return Request(
            id=f"local-{next(self._ids)}",
            sampling=self._sampling(sampling),
            messages=None if messages is None else tuple(messages),
            tokens=None if tokens is None else tuple(int(token) for token in tokens),
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            tools=None if tools is None else tuple(check_tools(tools) or ()),
            **fields,
        )

    def _chunks(self, request: Request, *, only_last: bool = False) -> Iterator[Chunk]:
        """Submit a request and yield its chunks. With `only_last` this thread sleeps until the answer is whole."""
        arrived: queue.SimpleQueue[Chunk] = queue.SimpleQueue()

        def sink(chunk: Chunk) -> None:
            if chunk.done or not only_last:
                arrived.put(chunk)

        self.worker.submit(request, sink)
        done = False
        try:
            while not done:
                chunk = arrived.get()
                done = chunk.done
                if chunk.completion is not None and chunk.completion.error is not None:
                    raise chunk.completion.error
                yield chunk
        finally:
            if not done:
                self.worker.cancel(request.id)
