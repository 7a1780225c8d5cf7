"""The public `Model`: text in, text out, from any thread.

Owns the worker of one bundle. Knows nothing of the command line or MQTT.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

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
        A directory that `edgelm export` wrote, the name of a pulled model, or `"builtin"` for the model inside the
        package.
    threads
        Threads of one operator; the default is the number of cores, at most 4.
    context
        Tokens of prompt and answer together that one request may have; the default and the limit are the bundle's.
    max_batch
        Requests decoded together; further requests wait.
    prefix_cache_mb
        Size of the prefix cache, in 10^6 bytes: keys and values of earlier prompts and answers, so that a prefix that
        a prompt shares with one of them is not computed again. 0 disables it.
    speculation
        Whether to propose draft tokens from earlier text while that saves time. The model decides which of them are
        accepted, so answers are the same as without, except for rounding between two almost equally likely tokens.
        If the length of a pass changes its rounding (onnxruntime's kernels), requests with a seed use neither draft
        tokens nor the prefix cache, so that a seed gives the same answer again; they do use the bundle's static prefix.
    cache
        Whether weights prepacked and kernels compiled for this processor are kept between runs and mapped into memory,
        in EDGELM_CACHE_DIR or ~/.cache/edgelm. This makes loading and decoding faster and takes no private memory. It
        takes about 1.3 times the bundle's size on disk, three times for processors without our own kernels; bundles
        below 16 MB are not cached.
    memory_limit_mb
        Maximum memory of the process, in 10^6 bytes. The sum of weights, KV cache at full context, logits and the
        program itself is checked before anything is loaded (`edgelm.runtime.memory_plan`).

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


_Params = ParamSpec("_Params")
_Answer = TypeVar("_Answer")


def _with_parameters_of(
    build: Callable[Concatenate[Model, _Params], Request],
) -> Callable[[Callable[[Model, Request], _Answer]], Callable[Concatenate[Model, _Params], _Answer]]:
    """Return a decorator that replaces a method's parameter `request` by the parameters of `build`.

    Two public methods share fourteen parameters, which are so declared once; `inspect.signature` shows them for both.
    """

    def decorate(method: Callable[[Model, Request], _Answer]) -> Callable[Concatenate[Model, _Params], _Answer]:
        @functools.wraps(method)
        def call(self: Model, /, *args: _Params.args, **kwargs: _Params.kwargs) -> _Answer:
            return method(self, build(self, *args, **kwargs))

        returned = inspect.signature(method).return_annotation
        call.__signature__ = inspect.signature(build).replace(return_annotation=returned)  # type: ignore[attr-defined]
        return call

    return decorate


class Model:
    """A loaded bundle. Safe to use from several threads; their requests are decoded together."""

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

    def _request(
        self,
        /,
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
    ) -> Request:
        """Return the request of `generate` and `stream`: lists as tuples, the timeout as a point in time."""
        return Request(
            id=f"local-{next(self._ids)}",
            sampling=self._sampling(sampling),
            prompt=prompt,
            messages=None if messages is None else tuple(messages),
            tokens=None if tokens is None else tuple(int(token) for token in tokens),
            constraint=make_constraint(json_schema, regex, choices),
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            session=session,
            end_session=end_session,
            tools=None if tools is None else tuple(check_tools(tools) or ()),
            template_vars=template_vars,
            system=system,
            raw=raw,
        )

    @_with_parameters_of(_request)
    def generate(self, request: Request) -> Completion:
        """Return the complete answer.

        Parameters
        ----------
        prompt, messages, tokens
            Exactly one: text, a conversation for the bundle's chat template, or token ids. If the bundle has a chat
            template, a prompt is one user message (`Manifest.prompts_are_messages`). The content of a message is text
            or a list of parts `{"type": "text", "text": ...}`; special tokens spelled in it are read as text. Messages
            with the role `tool` and `tool_calls` of the assistant are passed to the template unchanged.
        json_schema, regex, choices
            At most one: what the answer must match. `choices` is a list, even of one element.
        timeout_s
            Seconds until the answer ends with `finish_reason` "deadline".
        session
            Name of a session, 1 to 128 printable characters. It continues from exactly the tokens that were read and
            generated, so give only what is new. `prompt` and `tokens` are appended unchanged (start a prompt with a
            space or a line break if one belongs there); `messages` are appended to the earlier ones, and the chat
            template renders all of them. A new name begins a session; `turn` of its completion is 1. An answer that was
            cut off is kept as far as it came, without an end token; a request that fails leaves the session unchanged.
            Requests of one session are answered one after another. The 64 most recently used sessions are kept.
        end_session
            Whether to end the session after this request, even if the request fails.
        tools, template_vars
            Input for the bundle's chat template: function descriptions as most templates expect them,
            `[{"type": "function", "function": {"name": ..., "parameters": ...}}]`, and further variables such as
            `{"enable_thinking": False}`.
        system
            System message at the start of the conversation. A session keeps the one that it began with.
        raw
            Whether to complete `prompt` without the chat template.
        **sampling
            Fields of `SamplingParams`; the defaults are the bundle's.

        Raises
        ------
        RequestError
            A value is out of range, the prompt (with its session) does not fit the context, or the step failed.
        """
        last = next(self._chunks(request, only_last=True))
        if last.completion is None:
            raise AssertionError("the last chunk has the completion")
        return last.completion

    @_with_parameters_of(_request)
    def stream(self, request: Request) -> Iterator[Chunk]:
        """Yield the answer in chunks; the last one is `done` and has the completion.

        Leaving the loop early cancels the request. Parameters and errors are those of `generate`; an invalid argument
        raises at the call, before the first chunk.
        """
        return self._chunks(request)

    def end_session(self, name: str) -> bool:
        """End a session, after its current answer; return whether it existed."""
        return self.worker.call(lambda engine: engine.end_session(name))

    def sessions(self) -> dict[str, int]:
        """Return the number of tokens of each session by its name, the least recently used first."""
        return self.worker.call(lambda engine: engine.session_token_counts())

    def score(self, text: str) -> NDArray[np.float64]:
        """Return the natural-log probability of each token of a text after the first, float64 [n - 1].

        The text starts with the bundle's start token, if there is one. Raises `RequestError` if it is longer than the
        context.
        """
        tokens = self.document_tokens(text)
        return self.worker.call(lambda engine: engine.score(tokens))

    def score_tokens(self, tokens: Sequence[int]) -> NDArray[np.float64]:
        """Return the natural-log probability of each token after the first, float64 [n - 1]."""
        ids = list(tokens)
        return self.worker.call(lambda engine: engine.score(ids))

    def choose(self, prompt: str, choices: Sequence[str], *, raw: bool = False) -> tuple[str, float]:
        """Return the likeliest of several answers to a prompt, and its probability among them.

        If the bundle has a chat template and `raw` is false, the prompt is a user message and a choice is the start of
        the answer; otherwise a choice continues the prompt. The probability of a choice is the product of those of its
        tokens, so longer choices tend to be less likely. Raises `RequestError` if the prompt, `choices` or one of them
        is empty, or if one does not fit the context.
        """
        choices = check_choices(choices)
        tokenizer = self.tokenizer
        is_message = tokenizer.prompts_are_messages and not raw
        prefix = self.message_tokens([{"role": "user", "content": prompt}]) if is_message else tokenizer.encode(prompt)
        if not prompt or not prefix:
            raise RequestError("bad_request", "the prompt is empty: it has no token to continue")
        logprobs = []
        for choice in choices:
            together = [] if is_message else tokenizer.encode(prompt + choice)
            whole = together if together[: len(prefix)] == prefix else []  # not if the tokenizer appends an end token
            if len(whole) <= len(prefix):
                answer = choice.lstrip(" ") or choice if is_message else choice
                whole = [*prefix, *tokenizer.encode(answer, add_special_tokens=False)]
            logprobs.append(float(self.score_tokens(whole)[len(prefix) - 1 :].sum()))
        weights = np.exp(np.array(logprobs) - max(logprobs))
        best = int(weights.argmax())
        return choices[best], float(weights[best] / weights.sum())

    def message_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the tokens of a conversation as the chat template renders it.

        Raises `RequestError` if there is no template, or it refuses the messages.
        """
        tokenizer = self.tokenizer
        return tokenizer.encode_prompt(tokenizer.build_prompt(messages, tools, template_vars))

    def document_tokens(self, text: str) -> list[int]:
        """Return the tokens of a text as a document: the start token, if there is one, then the text."""
        if not isinstance(text, str):
            raise RequestError("bad_request", f"the text must be text, got {type(text).__name__}")
        bare = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.manifest.bos_token
        return bare if bos is None else [bos, *bare]

    def close(self) -> None:
        """Stop the worker; unfinished requests end with the error "interrupted"."""
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

    def _chunks(self, request: Request, *, only_last: bool = False) -> Iterator[Chunk]:
        """Submit a request and yield its chunks. With `only_last` this thread sleeps until the answer is complete."""
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
